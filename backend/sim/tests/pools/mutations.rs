//! Promises that are broken on purpose, to see that they are found out. Only with `--cfg hawser_mutations`, which
//! `cargo xtask sim` sets: see `hawser_volume::simulated`.

use crate::runner::{Mutation, mutation};

/// In the order in which docs/testing.md tells them.
pub(crate) const ALL: &[Mutation] = &[
    mutation("ack_before_intent", "power", 2000),
    mutation("skip_member_flush", "power", 2000),
    mutation("log_records_made_after_flush_began", "power", 4000),
    mutation("reuse_before_durable", "full", 4000),
    mutation("ack_before_stale_recorded", "members", 4000),
    mutation("checkpoint_frees_log_early", "power", 4000),
    mutation("checkpoint_overwrites_live_pages", "power", 20_000),
    mutation("checkpoint_root_before_pages", "power", 4000),
    mutation("valid_before_data", "kills", 4000),
    mutation("snapshot_without_barrier", "thin", 4000),
    mutation("read_unsynced_from_any", "members", 2000),
    mutation("resync_without_window", "members", 4000),
    mutation("tail_skipped", "kills", 2000),
    mutation("stale_member_read", "members", 2000),
    mutation("parity_write_unlogged", "parity", 4000),
    mutation("parity_log_after_data", "parity", 4000),
    mutation("parity_log_not_replayed", "parity", 4000),
    mutation("parity_released_unflushed", "parity", 4000),
    mutation("parity_released_in_memory_only", "parity", 4000),
    mutation("stripe_changed_by_two", "parity", 4000),
    mutation("degraded_read_without_lock", "parity", 4000),
    mutation("fresh_parity_trusted", "stripes", 4000),
    mutation("zeroes_not_written", "stripes", 4000),
    mutation("parity_log_replayed_backwards", "parity", 4000),
    mutation("older_entry_forgotten", "stripes", 4000),
    mutation("parity_not_made_again", "parity", 4000),
    mutation("swapped_without_tables", "replace", 4000),
];

/// Those that have histories of their own, in `sim/tests/pool_cases/orders`: seeds find them late, or never.
pub(crate) const OTHERS: &[&str] = &[
    "clear_intent_without_flush",
    "closed_before_durable",
    "closed_with_entries",
    "discards_of_logged",
    "discards_of_twins",
    "discards_outlive_close",
    "doubtful_members_lost",
    "doubts_forgotten",
    "entry_left_in_log",
    "fresh_beside_others",
    "grown_without_log",
    "half_written_opened",
    "invalid_units_not_durable",
    "joined_unflushed",
    "joined_with_lost_cache",
    "joined_without_tables",
    "late_failure_counts",
    "left_half_written",
    "left_undoubted",
    "stripe_left_half_written",
    "marked_not_copied_again",
    "mixed_columns_computed",
    "new_members_told_last",
    "not_told_before_overwritten",
    "old_member_erased_first",
    "old_superblocks_left",
    "opened_unrecorded",
    "opened_without_checkpoint",
    "parity_log_ended_before_replay",
    "parity_log_kept_over_rejoin",
    "parity_log_not_on_joining",
    "parity_replayed_unflushed",
    "put_in_unmarked",
    "read_only_not_doubted",
    "rebirth_before_durable",
    "superblocks_before_tables",
    "swapped_unflushed",
    "tail_not_kept",
    "taken_over_unflushed",
    "waiting_not_joined",
    "whole_stripes_logged",
    "unlogged_begun_without_all",
    "unlogged_ended_unflushed",
    "unlogged_not_told",
];

/// From now on this thread's histories break this promise.
pub(crate) fn set(name: Option<&str>) {
    hawser_volume::simulated::break_promise(name);
}
