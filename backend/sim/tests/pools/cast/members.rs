//! The disks: what the pool has of them, and what it can do without.

use super::{Cast, Health};
use hawser_block::{BlockSize, Device, DiscardLimits, Geometry, WriteZeroesLimits};
use hawser_sim::SimDisk;
use hawser_volume::pool::{MemberState, MemberView, Pool, PoolView};
use std::sync::Arc;

/// A disk.
pub(crate) struct Member {
    pub(crate) disk: Arc<SimDisk>,
    pub(crate) health: Health,
    /// Not one of the pool's any more.
    pub(crate) is_retired: bool,
    /// It was given to the pool, which may not have it yet.
    pub(crate) is_new: bool,
    /// Another one was to take its place.
    pub(crate) is_leaving: bool,
    /// It waited as a spare when it was last seen: while it takes a place it is in neither list.
    pub(crate) is_spare: bool,
    /// While it was away others were replaced: those that it trusts may be gone, and then nobody can tell whether it went on alone.
    pub(crate) is_outdated: bool,
}

impl Member {
    pub(crate) fn name(&self) -> String {
        self.disk.name().to_owned()
    }
}

impl Cast {
    /// A new disk, of the size that the pool's members have or a little more.
    pub(crate) fn new_member(&mut self) -> Member {
        let block_size: BlockSize = self.plan.block_size;
        let more = match usize::from(self.next_disk) {
            0 => 0,
            at if at < self.plan.members => self.random.below(5) * 4096,
            // As large as any that it may replace.
            at => (5 + at as u64) * 4096,
        };
        let blocks = (self.plan.member_bytes + more) >> block_size.shift();
        let geometry = Geometry {
            transfer_blocks_max: (256 << 10) >> block_size.shift(),
            volatile_cache: true,
            write_zeroes: Some(WriteZeroesLimits { blocks_max: 1 << 12, may_unmap: true }),
            // With parity only devices that promise zeroes are told what is not needed.
            discard: Some(DiscardLimits {
                blocks_max: 1 << 12,
                granularity_blocks: 1,
                reads_zeroes: self.plan.has_parity() && !self.plan.seed.is_multiple_of(4),
            }),
            ..Geometry::new(block_size, blocks)
        };
        let index = self.next_disk;
        self.next_disk += 1;
        let disk = SimDisk::new(&format!("d{index}"), geometry, [0xd0 + index; 16]);
        disk.seed(self.plan.seed ^ 0xd15c ^ u64::from(index) << 32);
        {
            let mut state = disk.state();
            state.cache_identity = self.plan.has_cache_identity.then_some([index + 5; 16]);
            state.tears = true;
            // As of a target that is gone: writes that were sent to it are carried out late, or never.
            let leaves_ghosts = self.plan.is_redundant() && self.plan.seed.is_multiple_of(3);
            (state.ignores_aborts, state.writes_stick) = (leaves_ghosts, leaves_ghosts);
            state.trap = Some(Arc::clone(&self.shared.trap));
            if self.plan.has_junk {
                state.fill_with_junk(self.plan.seed.wrapping_add(u64::from(index)));
            }
        }
        Member {
            disk: Arc::new(disk),
            health: Health::Good,
            is_retired: false,
            is_new: true,
            is_leaving: false,
            is_spare: false,
            is_outdated: false,
        }
    }

    /// A member is about to be replaced, or may be.
    pub(crate) fn members_change(&mut self) {
        let Some(view) = self.pool.as_ref().map(Pool::view) else { return };
        for at in 0..self.members.len() {
            let state = self.state_of(&view, self.members[at].disk.name());
            self.members[at].is_outdated |= state != Some(MemberState::InSync);
        }
    }

    /// Some disk fails some requests, or some blocks of it cannot be read: it may be put out at any time.
    pub(crate) fn has_faulty(&self) -> bool {
        self.present().any(|member| member.health == Health::Faulty)
    }

    /// Disks that are the pool's, as far as we know.
    pub(crate) fn present(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| !member.is_retired)
    }

    /// What the pool says of a disk.
    pub(crate) fn state_of(&self, view: &PoolView, name: &str) -> Option<MemberState> {
        let members = view.members.iter();
        members.clone().find(|member| member.device.as_deref() == Some(name)).map(|member| member.state)
    }

    /// No member is being brought up to date, and all that the pool does not know yet it has had time to notice.
    pub(crate) fn is_quiet(&self, view: &PoolView) -> bool {
        let syncs = view.tasks.iter().any(|task| !task.is_done && !matches!(task.kind, "scrub" | "replace"));
        // A stripe that was being written in a crash has no parity yet.
        let is_whole = !self.plan.has_parity() || view.unsynced_regions == 0 || view.is_degraded;
        !syncs && is_whole && self.world.now() >= self.doubtful_until
    }

    /// What is to take the place of a member that is in service.
    pub(crate) fn replacement(&self) -> Option<MemberView> {
        let view = self.pool.as_ref()?.view();
        view.members.into_iter().find(|member| member.state == MemberState::Replacing)
    }

    /// Members are being compared.
    pub(crate) fn is_scrubbed(&self) -> bool {
        let view = self.pool.as_ref().map(Pool::view);
        view.is_some_and(|view| view.tasks.iter().any(|task| task.kind == "scrub" && !task.is_done))
    }

    /// Every place has a member in sync, and nobody is ill.
    pub(crate) fn is_whole(&self) -> bool {
        let Some(pool) = &self.pool else { return false };
        let view = pool.view();
        let places = view.members.iter().filter(|member| member.place.is_some());
        // One that is being replaced is not, until it has been.
        self.is_quiet(&view)
            && places.clone().all(|member| member.state == MemberState::InSync)
            && self.present().all(|member| member.health == Health::Good)
    }

    /// Whether the pool goes on without this disk, and loses nothing.
    pub(crate) fn can_lose(&self, index: usize) -> bool {
        let Some(pool) = self.pool.as_ref().filter(|_| self.plan.is_redundant()) else { return false };
        let view = pool.view();
        let is_good = |(at, member): &(usize, &Member)| {
            *at != index
                && member.health == Health::Good
                && self.state_of(&view, member.disk.name()) == Some(MemberState::InSync)
        };
        let good = self.members.iter().enumerate().filter(is_good).count();
        let is_place =
            |member: &&MemberView| member.place.is_some() && member.state != MemberState::Replacing;
        let places = view.members.iter().filter(is_place).count();
        let is_one_set = places == self.plan.members;
        let redundancy = match is_one_set {
            true => self.plan.level.redundancy(u16::try_from(self.plan.members).unwrap_or(0)),
            false => 1,
        };
        // A copy takes the place of who is well, with whatever it lacks or can't read.
        let is_bad_copy = |(at, member): (usize, &Member)| {
            (at == index || member.health != Health::Good)
                && self.state_of(&view, member.disk.name()) == Some(MemberState::Replacing)
        };
        let bad_copies = self.members.iter().enumerate().any(is_bad_copy);
        let is_enough = good + usize::from(redundancy) >= places + usize::from(bad_copies);
        let is_quiet = match self.plan.has_parity() && self.plan.members - 1 > good {
            // Two may be lost, also while the first is being rebuilt: of what was written then, everything was in the log.
            true => self.world.now() >= self.doubtful_until,
            false => self.is_quiet(&view),
        };
        is_enough && is_quiet && self.asks.is_empty()
    }

    /// Sees which disks are the pool's now.
    pub(crate) fn take_roll(&mut self) {
        let Some(pool) = &self.pool else { return };
        if !self.asks.is_empty() {
            return;
        }
        let view = pool.view();
        let places: Vec<_> = view.members.iter().filter(|member| member.place.is_some()).collect();
        let all_there = places.iter().all(|member| member.device.is_some());
        for member in self.members.iter_mut().filter(|member| !member.is_retired) {
            let is_listed = view.members.iter().any(|it| it.device.as_deref() == Some(member.disk.name()));
            let is_in_sync = |it: &&MemberView| it.state == MemberState::InSync;
            let listed = view.members.iter().filter(|it| it.device.as_deref() == Some(member.disk.name()));
            member.is_outdated &= listed.clone().find(is_in_sync).is_none();
            if is_listed {
                member.is_new = false;
                member.is_spare = listed.clone().any(|it| it.state == MemberState::Spare);
            } else if member.is_spare {
                // It is on its way.
            } else if member.is_leaving || (all_there && !member.is_new) {
                member.is_retired = true;
            }
        }
    }
}
