//! Pools as text for people: a line for each, or all that is known of one.

use super::table::{self, Align, Table};
use crate::assemble::pool::without_name;
use crate::daemon::api::pool_view::{MemberView, PoolView, TaskView};
use hawser_volume::pool::MemberState;

/// One line for each pool, and what is wrong.
pub(super) fn table_of(pools: &[PoolView]) -> String {
    let mut table = Table::new(&[
        ("POOL", Align::Left),
        ("STATE", Align::Left),
        ("RAID", Align::Left),
        ("SIZE", Align::Right),
        ("FREE", Align::Right),
        ("IN SYNC", Align::Right),
        ("SPARES", Align::Right),
        ("WORK", Align::Left),
    ]);
    let size = |size: Option<u64>| size.map_or("-".to_owned(), table::bytes);
    for pool in pools {
        let is_member = |state: &str| state != MemberState::Replacing.name();
        let members = pool.members.iter().filter(|member| member.place.is_some() && is_member(&member.state));
        let in_sync = members.clone().filter(|member| member.state == "in_sync").count();
        table.row(vec![
            pool.name.clone(),
            pool.state.name().to_owned(),
            pool.level.clone(),
            size(pool.size_bytes),
            size(pool.free_bytes),
            format!("{in_sync} of {}", members.count()),
            pool.members.iter().filter(|member| member.place.is_none()).count().to_string(),
            pool.tasks.iter().find(|task| !task.done).map_or_else(String::new, work_of),
        ]);
    }
    let mut text = table.text();
    for pool in pools {
        for trouble in &pool.troubles {
            text.push_str(&format!("pool {}: {}\n", pool.name, without_name(&pool.name, trouble)));
        }
    }
    text
}

/// `rebuild 34 %, 5 min 7 s left`
fn work_of(task: &TaskView) -> String {
    let percent = u128::from(task.done_bytes) * 100 / u128::from(task.total_bytes.max(1));
    let left = task.left_seconds.map(|left| format!(", {} left", table::duration_seconds(left)));
    format!("{} {percent} %{}", task.kind, left.unwrap_or_default())
}

/// All that is known of a pool.
pub(super) fn text_of(pool: &PoolView) -> String {
    let mut text = format!("pool {}: {}, {}\n", pool.name, pool.state.name(), pool.level);
    for trouble in &pool.troubles {
        text.push_str(&format!("  {}\n", without_name(&pool.name, trouble)));
    }
    let mut facts = Table::new(&[("", Align::Left), ("", Align::Left)]);
    let mut fact = |what: &str, value: Option<String>| {
        if let Some(value) = value {
            facts.row(vec![format!("  {what}"), value]);
        }
    };
    fact("uuid", Some(pool.uuid.clone()));
    fact("size", pool.size_bytes.map(table::bytes));
    fact("free", pool.free_bytes.map(table::bytes));
    let used = pool.metadata_used_bytes.map(table::bytes);
    fact(
        "metadata",
        pool.metadata_bytes.zip(used).map(|(all, used)| format!("{used} of {}", table::bytes(all))),
    );
    fact("strip", pool.strip_bytes.map(|size| table::bytes(u64::from(size))));
    fact("extent", pool.extent_bytes.map(table::bytes));
    for task in &pool.tasks {
        let work = match task.done {
            false => work_of(task),
            true => format!(
                "{} ended, {} in {}",
                task.kind,
                table::bytes(task.done_bytes),
                table::duration_seconds(task.elapsed_seconds)
            ),
        };
        let mut found = String::new();
        if task.mismatches > 0 {
            found.push_str(&format!(", {} units differ{}", task.mismatches, faults_of(task)));
        }
        if task.failures > 0 {
            found.push_str(&format!(", {} could not be compared or rewritten", task.failures));
        }
        if let Some(why) = &task.cut_short {
            found.push_str(&format!(", before it was through: {why}"));
        }
        fact("work", Some(work + &found));
    }
    // Without the header, which says nothing.
    text.extend(facts.text().lines().skip(1).map(|line| format!("{line}\n")));
    let mut members = Table::new(&[
        ("  MEMBER", Align::Left),
        ("DEVICE", Align::Left),
        ("STATE", Align::Left),
        ("REPAIRED", Align::Right),
        ("", Align::Left),
    ]);
    for member in &pool.members {
        members.row(vec![
            member.place.map_or("  -".to_owned(), |place| format!("  {place}")),
            member.device.clone().unwrap_or("-".to_owned()),
            member.state.clone(),
            member.repaired.to_string(),
            notes_of(member),
        ]);
    }
    text.push_str(&members.text());
    text
}

/// How many of the units that differ are wrong in data, and in parity, where that is known.
pub(super) fn faults_of(task: &TaskView) -> String {
    let kinds = [(task.data_faults, "data"), (task.parity_faults, "parity")];
    let known: Vec<String> = kinds
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} in {what}"))
        .collect();
    if known.is_empty() { String::new() } else { format!(" ({})", known.join(", ")) }
}

/// What is wrong with a member.
fn notes_of(member: &MemberView) -> String {
    let wrong = (member.wrong > 0).then(|| format!("{} units of it were wrong", member.wrong));
    member.why.clone().into_iter().chain(wrong).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::api::pool_view::PoolState;

    fn pool() -> PoolView {
        let member = |place, device: Option<&str>, state: &str, why: Option<&str>| MemberView {
            place,
            device: device.map(str::to_owned),
            state: state.to_owned(),
            why: why.map(str::to_owned),
            repaired: 0,
            wrong: 0,
        };
        PoolView {
            name: "p0".to_owned(),
            uuid: "u".to_owned(),
            state: PoolState::Degraded,
            troubles: vec!["member 1 is missing".to_owned()],
            level: "raid1".to_owned(),
            strip_bytes: Some(65536),
            extent_bytes: Some(1 << 20),
            size_bytes: Some(10 << 30),
            free_bytes: Some(4 << 30),
            metadata_bytes: Some(64 << 20),
            metadata_used_bytes: Some(1 << 20),
            parity_log_writes: Some(0),
            parity_log_bytes: Some(0),
            members: vec![
                member(Some(0), Some("n0"), "in_sync", None),
                member(Some(1), None, "missing", Some("not found")),
                member(None, Some("n2"), "spare", None),
            ],
            tasks: vec![TaskView {
                kind: "rebuild".to_owned(),
                done_bytes: 34,
                total_bytes: 100,
                elapsed_seconds: 3,
                left_seconds: Some(307),
                mismatches: 0,
                data_faults: 0,
                parity_faults: 0,
                failures: 0,
                done: false,
                cut_short: None,
            }],
        }
    }

    #[test]
    fn a_list_has_a_line_for_each_pool_and_says_what_is_wrong() {
        let want = "POOL  STATE     RAID     SIZE   FREE  IN SYNC  SPARES  WORK\n\
                    p0    degraded  raid1  10 GiB  4 GiB   1 of 2       1  rebuild 34 %, 5 min 7 s left\n\
                    pool p0: member 1 is missing\n";
        assert_eq!(table_of(&[pool()]), want);
    }

    #[test]
    fn a_status_says_what_a_scrub_has_found_and_that_it_is_not_through() {
        let mut pool = pool();
        let task = &mut pool.tasks[0];
        (task.kind, task.done, task.mismatches, task.failures) = ("scrub".to_owned(), true, 4, 3);
        (task.data_faults, task.parity_faults) = (1, 2);
        task.cut_short = Some("another host has opened it".to_owned());
        let want = "  work      scrub ended, 34 B in 3 s, 4 units differ (1 in data, 2 in parity), 3 could not be compared or rewritten, before it was through: \
                    another host has opened it\n";
        assert!(text_of(&pool).contains(want), "{}", text_of(&pool));
    }

    #[test]
    fn a_status_names_every_member() {
        let text = text_of(&pool());
        let want = "pool p0: degraded, raid1\n\
                    \x20 member 1 is missing\n\
                    \x20 uuid      u\n\
                    \x20 size      10 GiB\n\
                    \x20 free      4 GiB\n\
                    \x20 metadata  1 MiB of 64 MiB\n\
                    \x20 strip     64 KiB\n\
                    \x20 extent    1 MiB\n\
                    \x20 work      rebuild 34 %, 5 min 7 s left\n\
                    \x20 MEMBER  DEVICE  STATE    REPAIRED\n\
                    \x20 0       n0      in_sync         0\n\
                    \x20 1       -       missing         0  not found\n\
                    \x20 -       n2      spare           0\n";
        assert_eq!(text, want);
    }
}
