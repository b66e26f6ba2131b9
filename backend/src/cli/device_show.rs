//! `hawser device show`: one device and its paths as text for people.

use crate::cli::table::{self, Align, Table};
use crate::daemon::api::view::{DeviceView, IoView, PathView};
use std::collections::BTreeMap;

/// Everything but what is 0.
pub(super) fn text_of(device: &DeviceView) -> String {
    let mut text = format!("device {}: {}", device.name, device.state);
    if let (Some(size), Some(block)) = (device.size_bytes, device.block_size) {
        text.push_str(&format!(", {} in blocks of {block} bytes", table::bytes(size)));
    }
    if let Some(pool) = &device.pool {
        text.push_str(&format!(", in pool {pool}"));
    }
    if let Some(uuid) = &device.uuid {
        text.push_str(&format!(", UUID {uuid}"));
    }
    text.push('\n');
    line(&mut text, "trouble", device.trouble.as_deref().unwrap_or_default());
    let settings: Vec<String> =
        device.settings.iter().map(|(key, value)| format!("{key} = {value}")).collect();
    line(&mut text, "settings", &settings.join(", "));
    line(&mut text, "counted", &counts(&device.counters));
    let copied = device.copied_bytes.iter().filter(|(_, bytes)| **bytes > 0);
    let copied: Vec<String> =
        copied.map(|(reason, bytes)| format!("{reason} {}", table::bytes(*bytes))).collect();
    line(&mut text, "copied", &copied.join(", "));
    io(&mut text, &device.io);
    for path in &device.paths {
        text.push_str(&format!("\npath {}: {}\n", path.uri, state_of(path)));
        line(&mut text, "trouble", path.trouble.as_deref().unwrap_or_default());
        let times = path.state_seconds.iter().filter(|(_, seconds)| **seconds > 0);
        let times: Vec<String> =
            times.map(|(state, seconds)| format!("{state} {}", table::duration_seconds(*seconds))).collect();
        line(&mut text, "was", &times.join(", "));
        line(&mut text, "counted", &counts(&path.counters));
        line(&mut text, "lost by", &counts(&path.losses));
        io(&mut text, &path.io);
    }
    text
}

/// `live, optimized`
pub(super) fn state_of(path: &PathView) -> String {
    let ana = path.ana.iter().map(|ana| format!(", {ana}"));
    std::iter::once(path.state.clone()).chain(ana).collect()
}

fn line(text: &mut String, name: &str, what: &str) {
    if !what.is_empty() {
        text.push_str(&format!("  {name}: {what}\n"));
    }
}

fn counts(counters: &BTreeMap<String, u64>) -> String {
    let some = counters.iter().filter(|(_, count)| **count > 0);
    some.map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}

fn io(text: &mut String, io: &IoView) {
    let some: Vec<_> = io.latency_ns.iter().filter(|(_, latency)| latency.count > 0).collect();
    if !some.is_empty() {
        let mut table = Table::new(&[
            ("  KIND", Align::Left),
            ("REQUESTS", Align::Right),
            ("BYTES", Align::Right),
            ("P50", Align::Right),
            ("P99", Align::Right),
            ("P99.9", Align::Right),
        ]);
        for (kind, latency) in some {
            table.row(vec![
                format!("  {kind}"),
                io.requests.get(kind).map_or(String::new(), |count| table::count(*count)),
                io.bytes.get(kind).map_or(String::new(), |bytes| table::bytes(*bytes)),
                table::duration_ns(latency.p50),
                table::duration_ns(latency.p99),
                table::duration_ns(latency.p999),
            ]);
        }
        text.push_str(&table.text());
    }
    line(text, "failed", &counts(&io.failures));
}
