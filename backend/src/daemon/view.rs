//! From the daemon's parts to what the API shows of them.

use super::api::view::{DeviceView, FrontEndView, IoView, LatencyView, PathView, RingsView};
use hawser_block::{Device, IoKind, StatsSet, Status};
use hawser_config::DeviceConfig;
use hawser_config::value::Uuid;
use hawser_virtio::{SessionView, VhostDisk};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

pub(super) fn io_view(stats: &StatsSet) -> IoView {
    let kinds: Vec<_> = IoKind::ALL.iter().map(|kind| (kind.name().to_owned(), stats.kind(*kind))).collect();
    IoView {
        requests: kinds.iter().map(|(name, kind)| (name.clone(), kind.requests)).collect(),
        bytes: kinds.iter().map(|(name, kind)| (name.clone(), kind.bytes)).collect(),
        failures: Status::ALL
            .iter()
            .map(|status| (status.name().to_owned(), stats.failures(*status)))
            .collect(),
        latency_ns: kinds
            .iter()
            .map(|(name, kind)| {
                let quantile = |permille| kind.latency.quantile_ns(permille);
                let latency = LatencyView {
                    p50: quantile(500),
                    p99: quantile(990),
                    p999: quantile(999),
                    count: kind.latency.count(),
                };
                (name.clone(), latency)
            })
            .collect(),
    }
}

pub(super) fn front_ends_view(server: &VhostDisk) -> Vec<FrontEndView> {
    let sessions = server.sessions().into_iter();
    sessions.map(|SessionView { serving, logging }| FrontEndView { serving, logging }).collect()
}

pub(super) fn rings_view(server: &VhostDisk) -> RingsView {
    let counters = server.counters();
    let mut view = RingsView {
        sessions: counters.sessions.load(Ordering::Relaxed),
        sessions_failed: counters.sessions_failed.load(Ordering::Relaxed),
        sessions_refused: counters.sessions_refused.load(Ordering::Relaxed),
        ..RingsView::default()
    };
    for queue in server.queue_counters() {
        view.batches += queue.batches.get();
        view.kicks += queue.kicks.get();
        view.interrupts += queue.interrupts.get();
        view.mistakes += queue.mistakes.get();
        view.replayed += queue.replayed.get();
    }
    view
}

/// What is wrong with a device, without its name in front.
pub(super) fn device_trouble(device: &dyn Device) -> Option<String> {
    let trouble = device.trouble();
    let what =
        trouble.strip_prefix(device.name()).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(&trouble);
    (!what.is_empty()).then(|| what.to_owned())
}

fn named(counts: Vec<(&'static str, u64)>) -> BTreeMap<String, u64> {
    counts.into_iter().map(|(name, count)| (name.to_owned(), count)).collect()
}

pub(super) fn device_view(config: &DeviceConfig, device: &dyn Device, pool: Option<String>) -> DeviceView {
    let geometry = device.geometry();
    let uuid = device.uuid();
    DeviceView {
        name: config.name.to_string(),
        uri: config.uri.0.clone(),
        state: device.state().name().to_owned(),
        trouble: device_trouble(device),
        size_bytes: geometry.map(|geometry| geometry.size_bytes()),
        block_size: geometry.map(|geometry| geometry.block_size.bytes()),
        pool,
        uuid: (uuid != [0; 16]).then(|| Uuid(uuid).to_string()),
        paths: device
            .paths()
            .into_iter()
            .map(|path| PathView {
                uri: path.uri,
                state: path.state.to_owned(),
                ana: path.ana.map(str::to_owned),
                trouble: Some(path.trouble).filter(|trouble| !trouble.is_empty()),
                counters: named(path.counters),
                losses: named(path.losses),
                state_seconds: path
                    .times
                    .iter()
                    .map(|(name, time)| (name.to_string(), time.as_secs()))
                    .collect(),
                io: io_view(&path.stats),
            })
            .collect(),
        settings: device
            .settings()
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect(),
        counters: named(device.counters()),
        copied_bytes: named(device.copied_bytes()),
        io: io_view(&device.stats()),
    }
}
