//! Promises that are broken on purpose, to see that they are found out. Only with `--cfg hawser_mutations`, which
//! `cargo xtask sim` sets: see `hawser_fabric::simulated`.

use crate::runner::{Mutation, mutation};

/// In the order in which docs/testing.md tells them.
pub(crate) const ALL: &[Mutation] = &[
    mutation("resend_before_quiet", "ghosts", 1000),
    mutation("reset_without_waiting", "ghosts", 1000),
    mutation("reset_leaves_connections", "ghosts", 1000),
    mutation("forget_predecessors", "successor", 1000),
    mutation("keep_old_associations", "successor", 1000),
    mutation("lose_unanswered", "links", 300),
    mutation("end_twice", "links", 300),
    mutation("never_wake_again", "ghosts", 1000),
    mutation("give_up_at_once", "disk", 300),
    mutation("fail_where_inaccessible", "ana", 300),
    mutation("reconnect_at_once", "links", 300),
    mutation("forget_fua", "restarts", 300),
    mutation("forget_write_through", "restarts", 300),
    mutation("forget_dirty_caches", "restarts", 300),
    mutation("trust_lost_caches", "restarts", 300),
    mutation("tell_one_flush", "restarts", 1000),
    mutation("forget_inherited_caches", "all", 1000),
    mutation("flush_without_device", "calm", 300),
    mutation("skip_data_digest", "digests", 1000),
    mutation("rdma_end_before_key_is_dead", "rdma", 300),
    mutation("rdma_end_before_sent", "rdma", 300),
    mutation("rdma_use_names_again", "rdma", 300),
    mutation("rdma_give_back_before_flush", "rdma", 300),
    mutation("rdma_wait_for_peer", "rdma", 300),
    mutation("rdma_forget_receives", "rdma", 300),
    mutation("rdma_reuse_before_sent", "rdma", 300),
];

/// From now on this thread's histories break this promise.
pub(crate) fn set(name: Option<&str>) {
    hawser_fabric::simulated::break_promise(name);
}
