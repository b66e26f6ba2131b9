//! `GET /metrics`: every number of the daemon in the OpenMetrics text format, read when it is asked for.

use super::pool_view::{PoolState, PoolView, TaskView, VolumeView};
use super::view::RingsView;
use crate::daemon::{Daemon, DeviceNumbers};
use hawser_block::{IoKind, KindSnapshot, StatsSet, Status};
use hawser_fabric::target::TargetStats;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use std::collections::BTreeSet;
use std::fmt::{self, Error};
use std::sync::Arc;

/// What [`text()`] is.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the histograms' buckets, in nanoseconds: 1, 2, 5 per decade from 5 us, below which only `null:` gets,
/// to 10 s, above which somebody has already been called.
const BOUNDS_NS: [u64; 20] = [
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
    200_000_000,
    500_000_000,
    1_000_000_000,
    2_000_000_000,
    5_000_000_000,
    10_000_000_000,
];

/// A counter: its name, what it means, where it comes from.
type RingsCounter = (&'static str, &'static str, fn(&RingsView) -> u64);

const RINGS: [RingsCounter; 8] = [
    ("disk_sessions", "Front ends that connected", |rings| rings.sessions),
    ("disk_sessions_failed", "Sessions that ended for a fault of the guest or its front end", |rings| {
        rings.sessions_failed
    }),
    ("disk_sessions_refused", "Front ends that were refused, because two were connected", |rings| {
        rings.sessions_refused
    }),
    ("disk_batches", "Times that a ring was drained and something was in it", |rings| rings.batches),
    ("disk_kicks", "Notifications from the guest", |rings| rings.kicks),
    ("disk_interrupts", "Notifications to the guest", |rings| rings.interrupts),
    ("disk_mistakes", "Requests answered with an error without asking the device", |rings| rings.mistakes),
    ("disk_replayed", "Requests of the process before this one that were carried out again", |rings| {
        rings.replayed
    }),
];

/// All states of a member: one that nobody is in is 0, not away.
const MEMBER_STATES: [&str; 6] = ["in_sync", "syncing", "stale", "missing", "spare", "replacing"];

/// Everything, as text.
pub(super) fn text(daemon: &Daemon) -> String {
    let mut registry = Registry::with_prefix("hawser");
    registry.register_collector(Box::new(Numbers::of(daemon)));
    let mut out = String::new();
    // Writing into a string cannot fail.
    let _ = text::encode(&mut out, &registry);
    out
}

struct Numbers {
    version: String,
    build_id: String,
    uptime_seconds: u64,
    crashes: u64,
    /// CPU or index, then passes, busy passes, sleeps.
    reactors: Vec<(String, [u64; 3])>,
    disks: Vec<(String, Arc<StatsSet>)>,
    disk_states: Vec<(String, &'static str)>,
    disk_rings: Vec<(String, RingsView)>,
    devices: Vec<DeviceNumbers>,
    device_states: Vec<(String, String)>,
    target: Option<TargetStats>,
    pools: Vec<PoolView>,
    volumes: Vec<VolumeView>,
}

impl fmt::Debug for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Numbers")
    }
}

impl Numbers {
    fn of(daemon: &Daemon) -> Numbers {
        let status = daemon.status();
        Numbers {
            version: status.version,
            build_id: status.build_id,
            uptime_seconds: status.uptime_seconds,
            crashes: status.crashes,
            reactors: status
                .reactors
                .iter()
                .enumerate()
                .map(|(index, reactor)| {
                    (index.to_string(), [reactor.passes, reactor.busy_passes, reactor.sleeps])
                })
                .collect(),
            disks: daemon.disk_stats(),
            disk_rings: status
                .disks
                .iter()
                .filter_map(|disk| Some((disk.name.clone(), disk.rings?)))
                .collect(),
            disk_states: status.disks.into_iter().map(|disk| (disk.name, disk.state.name())).collect(),
            devices: daemon.device_numbers(),
            target: daemon.target_stats(),
            pools: one_of_each_name(status.pools),
            volumes: status.volumes,
            device_states: status.devices.into_iter().map(|device| (device.name, device.state)).collect(),
        }
    }
}

impl Collector for Numbers {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let build = [("version", self.version.as_str()), ("build_id", self.build_id.as_str())];
        encoder
            .encode_descriptor("build", "Which binary this is", None, MetricType::Info)?
            .encode_info(&build)?;
        gauge(
            &mut encoder,
            "uptime",
            "How long the daemon serves",
            Some(&Unit::Seconds),
            self.uptime_seconds,
        )?;
        counter(&mut encoder, "crashes", "Deaths by the daemon's own fault", |metric| {
            metric.encode_counter::<NoLabelSet, u64, u64>(&self.crashes, None)
        })?;
        let reactor = [
            ("reactor_passes", "Passes of the reactor's loop"),
            ("reactor_busy_passes", "Passes that found something to do"),
            ("reactor_sleeps", "Times the reactor went to sleep"),
        ];
        for (which, (name, help)) in reactor.into_iter().enumerate() {
            counter(&mut encoder, name, help, |metric| {
                self.reactors.iter().try_for_each(|(reactor, numbers)| {
                    one(metric, &[("reactor", reactor.as_str())], numbers[which])
                })
            })?;
        }
        states(&mut encoder, "disk", self.disk_states.iter().map(|(name, state)| (name.as_str(), *state)))?;
        states(
            &mut encoder,
            "device",
            self.device_states.iter().map(|(name, state)| (name.as_str(), state.as_str())),
        )?;
        for (name, help, number) in RINGS {
            counter(&mut encoder, name, help, |metric| {
                self.disk_rings
                    .iter()
                    .try_for_each(|(disk, rings)| one(metric, &[("disk", disk.as_str())], number(rings)))
            })?;
        }
        if let Some(target) = &self.target {
            let connections = target.connections as u64;
            gauge(&mut encoder, "target_connections", "Connections of hosts", None, connections)?;
            let memory = target.memory_bytes as u64;
            gauge(&mut encoder, "target_memory", "What they have in memory", Some(&Unit::Bytes), memory)?;
            let help = "Connections that were not taken in";
            counter(&mut encoder, "target_connections_refused", help, |metric| {
                one(metric, &[], target.connections_refused)
            })?;
            let help = "Connections that ended because their peer broke the protocol";
            counter(&mut encoder, "target_protocol_errors", help, |metric| {
                one(metric, &[], target.protocol_errors)
            })?;
            let help = "Commands whose data came with a wrong digest";
            counter(&mut encoder, "target_digest_errors", help, |metric| {
                one(metric, &[], target.digest_errors)
            })?;
            let help = "Payload that was copied here, by reason";
            counter(&mut encoder, "target_copied_bytes", help, |metric| {
                one(metric, &[("reason", "capsule")], target.capsule_bytes)
            })?;
            let help = "Connects of hosts that are not among the allowed ones";
            counter(&mut encoder, "target_hosts_refused", help, |metric| {
                one(metric, &[], target.hosts_refused)
            })?;
        }
        self.pools(&mut encoder)?;
        self.volumes(&mut encoder)?;
        self.device_numbers(&mut encoder)?;
        let disks: Vec<_> =
            self.disks.iter().map(|(name, stats)| (vec![("disk", name.as_str())], stats)).collect();
        io(&mut encoder, "disk", &disks)?;
        let devices: Vec<_> = self
            .devices
            .iter()
            .map(|device| (vec![("device", device.name.as_str())], &device.stats))
            .collect();
        io(&mut encoder, "device", &devices)?;
        self.paths(&mut encoder)
    }
}

impl Numbers {
    /// What only some kinds of devices have.
    fn device_numbers(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let names: BTreeSet<&str> =
            self.devices.iter().flat_map(|device| device.counters.iter().map(|(name, _)| *name)).collect();
        for wanted in names {
            let help = "Only this kind of device counts it";
            counter(encoder, &format!("device_{wanted}"), help, |metric| {
                self.devices.iter().try_for_each(|device| {
                    let found = device.counters.iter().find(|(name, _)| *name == wanted);
                    found
                        .map_or(Ok(()), |(_, count)| one(metric, &[("device", device.name.as_str())], *count))
                })
            })?;
        }
        let help = "Payload that was copied in this process, by reason";
        counter(encoder, "device_copied_bytes", help, |metric| {
            self.devices.iter().try_for_each(|device| {
                device.copied_bytes.iter().try_for_each(|(reason, bytes)| {
                    one(metric, &[("device", device.name.as_str()), ("reason", reason)], *bytes)
                })
            })
        })?;
        let help = "How it was told to behave";
        let mut metric = encoder.encode_descriptor("device_setting", help, None, MetricType::Gauge)?;
        self.devices.iter().try_for_each(|device| {
            device.settings.iter().try_for_each(|(key, value)| {
                metric
                    .encode_family(&[("device", device.name.as_str()), ("key", key), ("value", value)])?
                    .encode_gauge(&1u64)
            })
        })
    }

    /// How pools are doing.
    fn pools(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        states(encoder, "pool", self.pools.iter().map(|pool| (pool.name.as_str(), pool.state.name())))?;
        type Size = (&'static str, &'static str, fn(&PoolView) -> Option<u64>);
        let sizes: [Size; 4] = [
            ("pool_size", "Room for data", |pool| pool.size_bytes),
            ("pool_free", "Of that, not given to any volume", |pool| pool.free_bytes),
            ("pool_metadata_size", "Room for mappings", |pool| pool.metadata_bytes),
            (
                "pool_metadata_used",
                "Of that, what they take; when it is all, first writes are refused",
                |pool| pool.metadata_used_bytes,
            ),
        ];
        for (name, help, size) in sizes {
            let mut metric = encoder.encode_descriptor(name, help, Some(&Unit::Bytes), MetricType::Gauge)?;
            for pool in &self.pools {
                if let Some(size) = size(pool) {
                    metric.encode_family(&[("pool", pool.name.as_str())])?.encode_gauge(&size)?;
                }
            }
        }
        let mut metric =
            encoder.encode_descriptor("pool_members", "Members by state", None, MetricType::Gauge)?;
        for pool in &self.pools {
            for state in MEMBER_STATES {
                let count = pool.members.iter().filter(|member| member.state == state).count() as u64;
                metric
                    .encode_family(&[("pool", pool.name.as_str()), ("state", state)])?
                    .encode_gauge(&count)?;
            }
        }
        counter(encoder, "pool_repaired", "Read errors that were repaired by rewriting", |metric| {
            self.pools.iter().try_for_each(|pool| {
                let repaired = pool.members.iter().map(|member| member.repaired).sum();
                one(metric, &[("pool", pool.name.as_str())], repaired)
            })
        })?;
        let logs: [Size; 2] = [
            ("pool_parity_log_writes", "Writes to members' parity logs", |pool| pool.parity_log_writes),
            ("pool_parity_log_bytes", "Bytes of them", |pool| pool.parity_log_bytes),
        ];
        for (name, help, count) in logs {
            counter(encoder, name, help, |metric| {
                self.pools.iter().try_for_each(|pool| {
                    count(pool).map_or(Ok(()), |count| one(metric, &[("pool", pool.name.as_str())], count))
                })
            })?;
        }
        type Done = (&'static str, &'static str, fn(&TaskView) -> u64);
        let tasks: [Done; 2] = [
            ("pool_task_done", "Bytes of members that are done", |task| task.done_bytes),
            ("pool_task_total", "Of how many", |task| task.total_bytes),
        ];
        for (name, help, bytes) in tasks {
            let mut metric = encoder.encode_descriptor(name, help, Some(&Unit::Bytes), MetricType::Gauge)?;
            for pool in &self.pools {
                for task in pool.tasks.iter().filter(|task| !task.done) {
                    let labels = [("pool", pool.name.as_str()), ("task", task.kind.as_str())];
                    metric.encode_family(&labels)?.encode_gauge(&bytes(task))?;
                }
            }
        }
        Ok(())
    }

    /// What is counted of volumes.
    fn volumes(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        type Size = (&'static str, &'static str, fn(&VolumeView) -> u64);
        let sizes: [Size; 2] = [
            ("volume_size", "As the VM sees it", |volume| volume.size_bytes),
            ("volume_mapped", "In extents of the pool, shared ones included", |volume| volume.mapped_bytes),
        ];
        for (name, help, size) in sizes {
            let mut metric = encoder.encode_descriptor(name, help, Some(&Unit::Bytes), MetricType::Gauge)?;
            for volume in &self.volumes {
                let labels = [("pool", volume.pool.as_str()), ("volume", volume.name.as_str())];
                metric.encode_family(&labels)?.encode_gauge(&size(volume))?;
            }
        }
        let help = "Requests that did not take the hot path";
        counter(encoder, "volume_slow_requests", help, |metric| {
            self.volumes.iter().try_for_each(|volume| {
                volume.slow.iter().try_for_each(|(class, count)| {
                    let (pool, name) = (volume.pool.as_str(), volume.name.as_str());
                    one(metric, &[("pool", pool), ("volume", name), ("class", class)], *count)
                })
            })
        })
    }

    /// What is counted of each path.
    fn paths(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let each = || {
            self.devices.iter().flat_map(|device| {
                device
                    .paths
                    .iter()
                    .map(|path| (vec![("device", device.name.as_str()), ("path", path.uri.as_str())], path))
            })
        };
        let mut metric =
            encoder.encode_descriptor("path_state", "How it is doing", None, MetricType::Gauge)?;
        for (labels, path) in each() {
            metric.encode_family(&with(&labels, "state", path.state))?.encode_gauge(&1u64)?;
        }
        let names: BTreeSet<&str> =
            each().flat_map(|(_, path)| path.counters.iter().map(|(name, _)| *name)).collect();
        for wanted in names {
            let help = "What became of its associations and commands";
            counter(encoder, &format!("path_{wanted}"), help, |metric| {
                each().try_for_each(|(labels, path)| {
                    let found = path.counters.iter().find(|(name, _)| *name == wanted);
                    found.map_or(Ok(()), |(_, count)| series(metric, &labels, *count))
                })
            })?;
        }
        counter(encoder, "path_losses", "Associations that were lost, by cause", |metric| {
            each().try_for_each(|(labels, path)| {
                path.losses
                    .iter()
                    .try_for_each(|(cause, count)| series(metric, &with(&labels, "cause", cause), *count))
            })
        })?;
        let help = "How long it has been in each state";
        let mut metric =
            encoder.encode_descriptor("path_in_state", help, Some(&Unit::Seconds), MetricType::Counter)?;
        for (labels, path) in each() {
            for (state, time) in &path.times {
                metric
                    .encode_family(&with(&labels, "state", state))?
                    .encode_counter::<NoLabelSet, f64, u64>(&time.as_secs_f64(), None)?;
            }
        }
        let all: Vec<_> = each().map(|(labels, path)| (labels, &path.stats)).collect();
        io(encoder, "path", &all)
    }
}

/// Labels of a series: names and values.
type Labels<'a> = Vec<(&'static str, &'a str)>;

/// `labels` and one more.
fn with<'a>(labels: &Labels<'a>, name: &'static str, value: &'a str) -> Labels<'a> {
    labels.iter().copied().chain([(name, value)]).collect()
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    value: u64,
) -> Result<(), Error> {
    encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?.encode_gauge(&value)
}

fn counter(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl FnOnce(&mut MetricEncoder<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    values(&mut encoder.encode_descriptor(name, help, None, MetricType::Counter)?)
}

fn one<const N: usize>(
    metric: &mut MetricEncoder<'_>,
    labels: &[(&str, &str); N],
    value: u64,
) -> Result<(), Error> {
    metric.encode_family(labels)?.encode_counter::<NoLabelSet, u64, u64>(&value, None)
}

fn series(metric: &mut MetricEncoder<'_>, labels: &Labels<'_>, value: u64) -> Result<(), Error> {
    metric.encode_family(labels)?.encode_counter::<NoLabelSet, u64, u64>(&value, None)
}

/// One series for each thing, with its state as a label and the value 1.
fn states<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    of: &str,
    states: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<(), Error> {
    let name = format!("{of}_state");
    let mut metric = encoder.encode_descriptor(&name, "How it is doing", None, MetricType::Gauge)?;
    for (name, state) in states {
        metric.encode_family(&[(of, name), ("state", state)])?.encode_gauge(&1u64)?;
    }
    Ok(())
}

/// The numbers of all disks, devices or paths, each with its labels.
fn io(
    encoder: &mut DescriptorEncoder<'_>,
    of: &str,
    all: &[(Labels<'_>, &Arc<StatsSet>)],
) -> Result<(), Error> {
    let name = format!("{of}_requests");
    counter(encoder, &name, "Requests that ended well", |metric| {
        each(all, |labels, stats| series(metric, labels, stats.requests))
    })?;
    let name = format!("{of}_bytes");
    counter(encoder, &name, "Bytes moved or covered by them", |metric| {
        each(all, |labels, stats| series(metric, labels, stats.bytes))
    })?;
    let name = format!("{of}_failures");
    counter(encoder, &name, "Requests that failed", |metric| {
        all.iter().try_for_each(|(labels, stats)| {
            Status::ALL.into_iter().try_for_each(|status| {
                series(metric, &with(labels, "status", status.name()), stats.failures(status))
            })
        })
    })?;
    let name = format!("{of}_latency");
    let help = "From submission to end, of all requests";
    let mut metric = encoder.encode_descriptor(&name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
    each(all, |labels, stats| {
        let latency = &stats.latency;
        let count = latency.count();
        let mut below = 0;
        let mut buckets = Vec::with_capacity(BOUNDS_NS.len() + 1);
        for bound in BOUNDS_NS {
            let up_to = latency.count_up_to(bound).max(below);
            buckets.push((seconds(bound), up_to - below));
            below = up_to;
        }
        buckets.push((f64::INFINITY, count.saturating_sub(below)));
        metric.encode_family(labels)?.encode_histogram::<NoLabelSet>(
            seconds(latency.sum_ns),
            count,
            &buckets,
            None,
        )
    })
}

fn each(
    all: &[(Labels<'_>, &Arc<StatsSet>)],
    mut f: impl FnMut(&Labels<'_>, &KindSnapshot) -> Result<(), Error>,
) -> Result<(), Error> {
    all.iter().try_for_each(|(labels, stats)| {
        IoKind::ALL.into_iter().try_for_each(|kind| f(&with(labels, "kind", kind.name()), &stats.kind(kind)))
    })
}

fn seconds(ns: u64) -> f64 {
    std::time::Duration::from_nanos(ns).as_secs_f64()
}

/// Of pools of one name, of which at most one is open, one: a series is there once.
fn one_of_each_name(pools: Vec<PoolView>) -> Vec<PoolView> {
    let mut all: Vec<PoolView> = Vec::new();
    for pool in pools {
        match all.iter_mut().find(|known| known.name == pool.name) {
            None => all.push(pool),
            Some(known) if known.state == PoolState::Waiting => *known = pool,
            Some(_) => {}
        }
    }
    all
}
