//! The management API: HTTP/1.1 and JSON on a Unix socket, on a thread of its own.
//!
//! Owns: the socket, the routes, what their answers look like. Must not know: how the daemon does what is asked of it.
//! Only who may open the socket may use the API: it has no other access control.

pub mod metrics;
pub mod pool_view;
mod pools;
pub mod view;

use super::{ChangeError, Daemon};
use hawser_config::DiscoveryConfig;
use hawser_config::value::{SocketMode, SocketPath};
use hawser_virtio::{BoundSocket, SocketAccess};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use view::{AddDisk, ChangeReservation, ErrorView, SetAnaState, SetDevice};

/// A disk's description has a few hundred bytes.
const BODY_MAX: usize = 64 << 10;
/// More clients at a time wait for their turn.
const CONNECTIONS_MAX: usize = 32;
/// A client that does not finish its request's head in this time is let go.
const HEAD_MAX: Duration = Duration::from_secs(10);

/// What others can build clients from.
pub const OPENAPI: &str = include_str!("../../../../docs/openapi.json");

/// The API's socket. The file goes away with it.
pub(super) struct ApiSocket(BoundSocket);

impl ApiSocket {
    /// Binds the socket. Whoever holds the daemon's lock may replace a socket that nobody listens at.
    ///
    /// # Errors
    /// One line that names the path.
    pub(super) fn bind(path: &SocketPath, mode: SocketMode) -> Result<ApiSocket, String> {
        let access = SocketAccess { mode: Some(mode.0), ..SocketAccess::default() };
        BoundSocket::listen(path.as_path(), &access).map(ApiSocket).map_err(|error| error.to_string())
    }
}

/// Serves the API on a thread of its own, as long as the process lives.
///
/// # Errors
/// When the thread or its event loop cannot be had.
pub(super) fn serve(daemon: Arc<Daemon>, socket: &ApiSocket) -> io::Result<()> {
    let listener = socket.0.listener().try_clone()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("api".to_owned()).spawn(move || {
        runtime.block_on(async move {
            match tokio::net::UnixListener::from_std(listener) {
                Ok(listener) => accept(daemon, listener).await,
                Err(error) => log::error!("API: {error}"),
            }
        });
    })?;
    Ok(())
}

async fn accept(daemon: Arc<Daemon>, listener: tokio::net::UnixListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                log::warn!("API: a client could not be accepted: {error}; trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let daemon = Arc::clone(&daemon);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(Arc::clone(&daemon), request));
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_MAX)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                log::debug!("API: {error}");
            }
            drop(place);
        });
    }
}

type Answer = Response<Full<Bytes>>;

async fn answer(daemon: Arc<Daemon>, request: Request<Incoming>) -> Result<Answer, Infallible> {
    Ok(route(daemon, request).await.unwrap_or_else(|error| {
        let ApiError(status, error) = error;
        json(status, &ErrorView { error })
    }))
}

struct ApiError(StatusCode, String);

impl From<ChangeError> for ApiError {
    fn from(error: ChangeError) -> ApiError {
        match error {
            ChangeError::Wrong(what) => ApiError(StatusCode::BAD_REQUEST, what),
            ChangeError::Unknown(what) => ApiError(StatusCode::NOT_FOUND, what),
            ChangeError::Conflict(what) => ApiError(StatusCode::CONFLICT, what),
            ChangeError::Failed(what) => ApiError(StatusCode::INTERNAL_SERVER_ERROR, what),
        }
    }
}

fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    let body = serde_json::to_vec(value).expect("our own values have string keys and no failing parts");
    whole(status, "application/json", body)
}

fn whole(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}

async fn route(daemon: Arc<Daemon>, request: Request<Incoming>) -> Result<Answer, ApiError> {
    let path = request.uri().path().to_owned();
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    let get = request.method() == Method::GET;
    if let ["v1", "pools" | "volumes", ..] = segments.as_slice() {
        return pools::route(daemon, request, &segments[1..]).await;
    }
    match segments.as_slice() {
        ["metrics"] if get => Ok(whole(StatusCode::OK, metrics::CONTENT_TYPE, metrics::text(&daemon))),
        ["v1", "openapi.json"] if get => Ok(whole(StatusCode::OK, "application/json", OPENAPI)),
        ["v1", "status"] if get => Ok(json(StatusCode::OK, &daemon.status())),
        ["v1", "devices"] if get => Ok(json(StatusCode::OK, &daemon.device_views())),
        ["v1", "devices", name] if get => {
            Ok(json(StatusCode::OK, &daemon.device_view(name).map_err(ApiError::from)?))
        }
        ["v1", "devices", name] if request.method() == Method::PATCH => {
            let name = (*name).to_owned();
            let SetDevice { io_policy } = body(request).await?;
            Ok(json(StatusCode::OK, &change(move || daemon.set_device(&name, &io_policy)).await?))
        }
        ["v1", "devices", name, "reservation"] if get => {
            let name = (*name).to_owned();
            Ok(json(StatusCode::OK, &change(move || daemon.reservation(&name)).await?))
        }
        ["v1", "devices", name, "reservation"] if request.method() == Method::POST => {
            let name = (*name).to_owned();
            let asked: ChangeReservation = body(request).await?;
            Ok(json(StatusCode::OK, &change(move || daemon.reserve(&name, &asked)).await?))
        }
        ["v1", "discovery"] if get => Ok(json(StatusCode::OK, &daemon.discovery())),
        ["v1", "discovery"] if request.method() == Method::PUT => {
            let discovery: DiscoveryConfig = body(request).await?;
            Ok(json(StatusCode::OK, &change(move || daemon.set_discovery(&discovery)).await?))
        }
        ["v1", "subsystems"] if get => Ok(json(StatusCode::OK, &daemon.subsystem_views())),
        ["v1", "disks"] if get => Ok(json(StatusCode::OK, &daemon.disk_views())),
        ["v1", "disks"] if request.method() == Method::POST => {
            let add: AddDisk = body(request).await?;
            let disk = change(move || daemon.add_disk(add.disk, add.save)).await?;
            Ok(json(StatusCode::CREATED, &disk))
        }
        ["v1", "disks", name] if get => {
            let disk = daemon.disk_views().into_iter().find(|disk| disk.name == *name);
            let disk = disk.ok_or_else(|| ApiError(StatusCode::NOT_FOUND, daemon.no_such_disk(name)))?;
            Ok(json(StatusCode::OK, &disk))
        }
        ["v1", "disks", name] if request.method() == Method::DELETE => {
            let name = (*name).to_owned();
            let save = match request.uri().query() {
                None | Some("save=false") => false,
                Some("save=true") => true,
                Some(other) => {
                    let what = format!("query {other:?} is not known, want save=true or save=false");
                    return Err(ApiError(StatusCode::BAD_REQUEST, what));
                }
            };
            let disk = change(move || daemon.remove_disk(&name, save)).await?;
            Ok(json(StatusCode::OK, &disk))
        }
        ["v1", "disks", name, "resume"] if request.method() == Method::POST => {
            let name = (*name).to_owned();
            let disk = change(move || daemon.resume_disk(&name)).await?;
            Ok(json(StatusCode::OK, &disk))
        }
        ["v1", "subsystems", nqn, "ports", port, "ana_groups", grpid] if request.method() == Method::PUT => {
            let [nqn, port, grpid] = [*nqn, *port, *grpid].map(str::to_owned);
            let SetAnaState { ana_state } = body(request).await?;
            let set = move || daemon.set_ana_state(&nqn, &port, &grpid, &ana_state);
            Ok(json(StatusCode::OK, &change(set).await?))
        }
        ["v1", "subsystems", nqn, "hosts", host]
            if request.method() == Method::PUT || request.method() == Method::DELETE =>
        {
            let [nqn, host] = [*nqn, *host].map(str::to_owned);
            let allowed = request.method() == Method::PUT;
            let set = move || daemon.set_allowed(&nqn, &host, allowed);
            Ok(json(StatusCode::OK, &change(set).await?))
        }
        ["metrics"]
        | ["v1", "subsystems", _, "hosts", _]
        | ["v1", "subsystems", _, "ports", _, "ana_groups", _]
        | ["v1", "openapi.json" | "status" | "devices" | "discovery" | "subsystems" | "disks"]
        | ["v1", "disks" | "devices", _]
        | ["v1", "devices", _, "reservation"]
        | ["v1", "disks", _, "resume"] => {
            let what = format!("{} is not for {path}, see /v1/openapi.json", request.method());
            Err(ApiError(StatusCode::METHOD_NOT_ALLOWED, what))
        }
        _ => Err(ApiError(StatusCode::NOT_FOUND, format!("{path} is not there, see /v1/openapi.json"))),
    }
}

async fn body<T: serde::de::DeserializeOwned>(request: Request<Incoming>) -> Result<T, ApiError> {
    let wrong = |what: String| ApiError(StatusCode::BAD_REQUEST, what);
    let body = Limited::new(request.into_body(), BODY_MAX).collect();
    let body = tokio::time::timeout(HEAD_MAX, body)
        .await
        .map_err(|_| ApiError(StatusCode::REQUEST_TIMEOUT, "the request's body did not come".to_owned()))?
        .map_err(|error| wrong(format!("the request's body cannot be read: {error}")))?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| {
        let text = error.to_string();
        // The place in a text that a program wrote helps nobody.
        wrong(text.split(" at line ").next().unwrap_or(&text).to_owned())
    })
}

/// Changes take their time (draining, files): never on the thread that answers everybody.
async fn change<T: Send + 'static>(
    change: impl FnOnce() -> Result<T, ChangeError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(change).await {
        Ok(result) => result.map_err(ApiError::from),
        Err(error) => Err(ApiError(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}
