//! The end of all pools, in the time that there is.

use super::Shared;
use super::look::blocking;
use super::state::{Open, Phase};
use crate::assemble::pool as assemble;
use crate::assemble::{host, reserve};
use std::sync::Arc;
use std::time::Instant;

impl Shared {
    /// Closes what is open, in the time that there is.
    pub(super) async fn close(self: &Arc<Self>, deadline: Instant) -> bool {
        let limit = tokio::time::Instant::from_std(deadline);
        let mut all_closed = true;
        while self.state().tasks > 0 {
            if tokio::time::timeout_at(limit, self.wake.notified()).await.is_err()
                && Instant::now() >= deadline
            {
                log::warn!("pools: what is being opened is left");
                all_closed = false;
                break;
            }
        }
        let identity = host::identity(&self.config.host, &self.config.daemon.state_dir);
        let entries = std::mem::take(&mut self.state().pools);
        let closings: Vec<_> = entries
            .into_values()
            .filter_map(|entry| match entry.phase {
                Phase::Open(open) => Some(open),
                Phase::Waiting { .. } | Phase::Opening => None,
            })
            .map(|open| tokio::spawn(close_one(open, identity.as_ref().ok().map(|it| it.id.0), limit)))
            .collect();
        for closing in closings {
            all_closed &= closing.await.unwrap_or(false);
        }
        all_closed
    }
}

async fn close_one(open: Open, host: Option<[u8; 16]>, limit: tokio::time::Instant) -> bool {
    let Open { pool, reserved, tail } = open;
    let name = pool.name().to_owned();
    match tokio::time::timeout_at(limit, pool.close()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            log::warn!("pool {name}: not closed in order: {}", assemble::line_of(error));
            return false;
        }
        Err(_) => {
            log::warn!(
                "pool {name}: not closed in time: the next start goes on from what the run state has of it"
            );
            return false;
        }
    }
    drop(pool);
    if let Err(error) = std::fs::remove_file(&tail) {
        log::warn!("{}: cannot be removed: {error}", tail.display());
    }
    if let Some(host) = host {
        let left = blocking(move || {
            reserved.iter().for_each(|device| reserve::leave(device.as_ref(), &host));
            Ok(())
        });
        // Then the next opener finds it ours.
        let _ = tokio::time::timeout_at(limit, left).await;
    }
    log::info!("pool {name}: closed");
    true
}
