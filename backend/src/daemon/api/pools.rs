//! The routes of pools and volumes.

use super::pool_view::{
    AddDevices, CreatePool, CreateVolume, MakeClone, Replace, Scrub, SetVolume, TakeSnapshots,
};
use super::{Answer, ApiError, body, change, json, whole};
use crate::daemon::Daemon;
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use std::sync::Arc;

/// Answers what is below `/v1/pools` and `/v1/volumes`; `segments` begin there.
pub(super) async fn route(
    daemon: Arc<Daemon>,
    request: Request<Incoming>,
    segments: &[&str],
) -> Result<Answer, ApiError> {
    let path = request.uri().path().to_owned();
    let segments: Vec<String> = segments.iter().map(|segment| (*segment).to_owned()).collect();
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let method = request.method().clone();
    let (get, post) = (method == Method::GET, method == Method::POST);
    let (ok, created) = (StatusCode::OK, StatusCode::CREATED);
    match segments.as_slice() {
        ["pools"] if get => Ok(json(ok, &change(move || Ok(daemon.pool_views())).await?)),
        ["pools"] if post => {
            let create: CreatePool = body(request).await?;
            Ok(json(created, &change(move || daemon.create_pool(&create)).await?))
        }
        ["pools", pool] if get => {
            let pool = (*pool).to_owned();
            Ok(json(ok, &change(move || daemon.pool_view(&pool)).await?))
        }
        ["pools", pool, "scrub"] if post => {
            let (pool, scrub): (_, Scrub) = ((*pool).to_owned(), body(request).await?);
            Ok(json(ok, &change(move || daemon.scrub_pool(&pool, scrub)).await?))
        }
        ["pools", pool, "replace"] if post => {
            let (pool, replace): (_, Replace) = ((*pool).to_owned(), body(request).await?);
            Ok(json(ok, &change(move || daemon.replace_member(&pool, &replace)).await?))
        }
        ["pools", pool, "replace"] if method == Method::DELETE => {
            let pool = (*pool).to_owned();
            Ok(json(ok, &change(move || daemon.abort_replace(&pool)).await?))
        }
        ["pools", pool, "grow"] if post => {
            let (pool, add): (_, AddDevices) = ((*pool).to_owned(), body(request).await?);
            Ok(json(ok, &change(move || daemon.grow_pool(&pool, &add)).await?))
        }
        ["pools", pool, "spares"] if post => {
            let (pool, add): (_, AddDevices) = ((*pool).to_owned(), body(request).await?);
            Ok(json(ok, &change(move || daemon.add_spares(&pool, &add)).await?))
        }
        ["volumes"] if get => Ok(json(ok, &change(move || Ok(daemon.volume_views())).await?)),
        ["pools", pool, "volumes"] if get => {
            let pool = (*pool).to_owned();
            Ok(json(ok, &change(move || daemon.volume_views_of(&pool)).await?))
        }
        ["pools", pool, "volumes"] if post => {
            let (pool, create): (_, CreateVolume) = ((*pool).to_owned(), body(request).await?);
            Ok(json(created, &change(move || daemon.create_volume(&pool, &create)).await?))
        }
        ["pools", pool, "snapshots"] if post => {
            let (pool, take): (_, TakeSnapshots) = ((*pool).to_owned(), body(request).await?);
            Ok(json(created, &change(move || daemon.take_snapshots(&pool, &take)).await?))
        }
        ["pools", pool, "clones"] if post => {
            let (pool, make): (_, MakeClone) = ((*pool).to_owned(), body(request).await?);
            Ok(json(created, &change(move || daemon.make_clone(&pool, &make)).await?))
        }
        ["pools", pool, "volumes", volume] if get => {
            let [pool, volume] = [*pool, *volume].map(str::to_owned);
            Ok(json(ok, &change(move || daemon.volume_view(&pool, &volume)).await?))
        }
        ["pools", pool, "volumes", volume] if method == Method::PATCH => {
            let [pool, volume] = [*pool, *volume].map(str::to_owned);
            let set: SetVolume = body(request).await?;
            Ok(json(ok, &change(move || daemon.resize_volume(&pool, &volume, set)).await?))
        }
        ["pools", pool, "volumes", volume] if method == Method::DELETE => {
            let [pool, volume] = [*pool, *volume].map(str::to_owned);
            Ok(json(ok, &change(move || daemon.delete_volume(&pool, &volume)).await?))
        }
        ["pools", pool, "volumes", volume, "data"] if get => {
            let [pool, volume] = [*pool, *volume].map(str::to_owned);
            let (offset, length) = range_of(request.uri().query().unwrap_or_default())?;
            let data = change(move || daemon.volume_data(&pool, &volume, offset, length)).await?;
            Ok(match data {
                Some(data) => whole(ok, "application/octet-stream", data),
                None => whole(StatusCode::NO_CONTENT, "application/octet-stream", Vec::new()),
            })
        }
        ["pools" | "volumes"]
        | ["pools", _]
        | ["pools", _, "scrub" | "replace" | "grow" | "spares" | "volumes" | "snapshots" | "clones"]
        | ["pools", _, "volumes", _]
        | ["pools", _, "volumes", _, "data"] => {
            let what = format!("{method} is not for {path}, see /v1/openapi.json");
            Err(ApiError(StatusCode::METHOD_NOT_ALLOWED, what))
        }
        _ => Err(ApiError(StatusCode::NOT_FOUND, format!("{path} is not there, see /v1/openapi.json"))),
    }
}

/// `offset=4096&length=1048576`
fn range_of(query: &str) -> Result<(u64, u64), ApiError> {
    let value = |key: &str| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(name, _)| *name == key).and_then(|(_, value)| value.parse().ok())
    };
    match (value("offset"), value("length")) {
        (Some(offset), Some(length)) => Ok((offset, length)),
        _ => {
            let what = format!("query {query:?} is no range, want offset=BYTES&length=BYTES");
            Err(ApiError(StatusCode::BAD_REQUEST, what))
        }
    }
}
