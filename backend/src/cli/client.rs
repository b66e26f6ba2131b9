//! The command line's way to a running daemon: one request over the API's socket.

use crate::cli::Failure;
use crate::daemon::api::view::ErrorView;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longer than any drain: who stops a disk may have set `drain_timeout` to an hour.
const CHANGE_MAX: Duration = Duration::from_secs(2 * 3600);
/// Looking takes no time: a daemon that does not answer is stuck.
const LOOK_MAX: Duration = Duration::from_secs(20);
/// What a daemon asks of a target has a minute, twice.
const ASK_MAX: Duration = Duration::from_secs(150);
/// A daemon that does not take the connection in this time is stuck.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// A daemon, named by its socket.
pub(super) struct Client {
    api: PathBuf,
}

impl Client {
    pub(super) fn new(api: &Path) -> Client {
        Client { api: api.to_owned() }
    }

    pub(super) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.call(Method::GET, path, None, LOOK_MAX)
    }

    /// Looks at what the daemon has to ask others for.
    pub(super) fn ask<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.call(Method::GET, path, None, ASK_MAX)
    }

    /// Bytes, and not JSON; nothing where there are none.
    pub(super) fn bytes(&self, path: &str) -> Result<Bytes, Failure> {
        self.answer(Method::GET, path, None, ASK_MAX)
    }

    pub(super) fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Failure> {
        let body = body.map(serde_json::to_vec).transpose().map_err(|error| self.failed(&error))?;
        self.call(Method::PUT, path, body, CHANGE_MAX)
    }

    pub(super) fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.call(Method::DELETE, path, None, CHANGE_MAX)
    }

    pub(super) fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Failure> {
        let body = body.map(serde_json::to_vec).transpose().map_err(|error| self.failed(&error))?;
        self.call(Method::POST, path, body, CHANGE_MAX)
    }

    pub(super) fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Failure> {
        let body = serde_json::to_vec(body).map_err(|error| self.failed(&error))?;
        self.call(Method::PATCH, path, Some(body), CHANGE_MAX)
    }

    fn failed(&self, what: &dyn std::fmt::Display) -> Failure {
        Failure::Failed(format!("{}: {what}", self.api.display()))
    }

    fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        limit: Duration,
    ) -> Result<T, Failure> {
        let body = self.answer(method, path, body, limit)?;
        serde_json::from_slice(&body)
            .map_err(|error| self.failed(&format!("the daemon's answer is not understood: {error}")))
    }

    fn answer(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        limit: Duration,
    ) -> Result<Bytes, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| self.failed(&error))?;
        let (status, body) = runtime.block_on(self.exchange(method, path, body, limit))?;
        if status.is_success() {
            return Ok(body);
        }
        let what =
            serde_json::from_slice::<ErrorView>(&body).map_or_else(|_| status.to_string(), |view| view.error);
        if status == StatusCode::BAD_REQUEST { Err(Failure::Usage(what)) } else { Err(Failure::Failed(what)) }
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), Failure> {
        let stream = tokio::time::timeout(CONNECT_MAX, tokio::net::UnixStream::connect(&self.api))
            .await
            .map_err(|_| self.failed(&"the daemon does not take connections"))?
            .map_err(|error| self.no_daemon(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.failed(&error))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "hawser")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|error| self.failed(&error))?;
        let answer = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            Ok::<_, hyper::Error>((status, response.into_body().collect().await?.to_bytes()))
        };
        tokio::time::timeout(limit, answer)
            .await
            .map_err(|_| self.failed(&format!("the daemon has not answered for {} s", limit.as_secs())))?
            .map_err(|error| self.failed(&format!("the daemon's answer was cut off: {error}")))
    }

    fn no_daemon(&self, error: &io::Error) -> Failure {
        let why = match error.kind() {
            io::ErrorKind::NotFound => "no daemon serves this API socket".to_owned(),
            io::ErrorKind::ConnectionRefused => "the daemon of this API socket has ended".to_owned(),
            _ => format!("cannot be reached: {error}"),
        };
        self.failed(&format!("{why}; start `hawser serve`, or name another by --api or HAWSER_API"))
    }
}
