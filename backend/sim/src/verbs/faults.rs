//! What goes wrong between queue pairs: connections that break, silence, messages that are held up, processes that are killed.

use super::fabric::{End, Fabric, Progress, STEP_NS_MAX};
use crate::net::{Side, Sides};
use hawser_runtime::Instant;
use hawser_verbs_abi::event;
use std::net::SocketAddr;
use std::time::Duration;

impl Fabric {
    /// Breaks the connection of a queue: both ends are in error, and hear of it or not.
    pub(super) fn break_connection(&mut self, queue: u64) {
        self.counts.breaks += 1;
        let Some(id) = self.pairs.get(&queue).map(|pair| pair.id) else { return };
        let peer = self.ends.get(&id).map_or(0, |end| end.peer);
        for id in [id, peer] {
            self.break_end(id);
        }
    }

    fn break_end(&mut self, id: u64) {
        let Some(queue) = self.ends.get(&id).map(|end| end.queue) else { return };
        self.fail(queue);
        if self.random.chance(500) {
            self.tell(id, (event::DISCONNECTED, 0), None, None);
        }
    }

    fn ends_at(&self, address: SocketAddr, side: Side) -> Vec<u64> {
        let here = |end: &End| end.address == Some(address) && end.side == side && end.queue != 0;
        self.ends.iter().filter(|(_, end)| here(end)).map(|(id, _)| *id).collect()
    }

    /// Breaks connections to `address` at these ends, each by chance; what is on its way to the other is held for so long.
    pub(super) fn reset(&mut self, address: SocketAddr, sides: Sides, permille: u64, hold: Duration) {
        let until = self.now + hold;
        for host in self.ends_at(address, Side::Host) {
            if !self.random.chance(permille) {
                continue;
            }
            let peer = self.ends.get(&host).map_or(0, |end| end.peer);
            self.counts.breaks += 1;
            for (id, side) in [(host, Side::Host), (peer, Side::Target)] {
                if sides.has(side) {
                    self.break_end(id);
                } else if let Some(end) = self.ends.get_mut(&id) {
                    end.held = end.held.max(until);
                    let queue = end.queue;
                    for loose in self.loose.iter_mut().filter(|loose| loose.to == queue) {
                        loose.arrives = loose.arrives.max(until);
                    }
                }
            }
        }
    }

    pub(super) fn half_close(&mut self, address: SocketAddr, side: Side, permille: u64) {
        for id in self.ends_at(address, side) {
            if self.random.chance(permille) {
                self.tell(id, (event::DISCONNECTED, 0), None, None);
            }
        }
    }

    pub(super) fn hold(&mut self, address: SocketAddr, side: Side, permille: u64, until: Instant) {
        for id in self.ends_at(address, side) {
            if !self.random.chance(permille) {
                continue;
            }
            let Some(end) = self.ends.get_mut(&id) else { continue };
            end.held = end.held.max(until);
            let peer = end.peer;
            let peer = self.ends.get(&peer).map_or(0, |end| end.queue);
            if let Some(pair) = self.pairs.get_mut(&peer) {
                for work in &mut pair.works {
                    if let Progress::Going(_, arrives, _) = &mut work.state {
                        *arrives = (*arrives).max(until);
                    }
                }
            }
        }
        self.changed = true;
    }

    pub(super) fn silence(&mut self, address: SocketAddr, sides: Sides, until: Instant) {
        self.silences.push((address, sides, until));
        self.changed = true;
    }

    pub(super) fn clear_network(&mut self) {
        self.silences.clear();
        self.lost_ends_permille = 0;
        self.disturbance.breaks = 0;
        let now = self.now;
        for end in self.ends.values_mut() {
            end.held = end.held.min(now);
        }
        for work in self.pairs.values_mut().flat_map(|pair| &mut pair.works) {
            if let Progress::Going(_, arrives, _) = &mut work.state {
                *arrives = (*arrives).min(now + Duration::from_nanos(STEP_NS_MAX));
            }
        }
        self.changed = true;
    }

    /// The device is removed: all that is on it ends, and its users hear of it. Another one comes.
    pub(super) fn replace_device(&mut self) {
        self.replaced += 1;
        let queues: Vec<u64> = self.pairs.keys().copied().collect();
        queues.into_iter().for_each(|queue| self.fail(queue));
        let ends: Vec<u64> = self.ends.keys().copied().collect();
        for id in ends {
            self.tell(id, (event::DEVICE_REMOVAL, 0), None, None);
        }
    }

    /// A reactor waits for this descriptor: what is behind it is its process's.
    pub(super) fn own(&mut self, fd: i32, owner: usize) {
        if let Some(channel) = self.channels.values_mut().find(|channel| channel.fd == fd) {
            channel.owner = Some(owner);
        }
    }

    /// Ends everything of a reactor, as the kernel does for a process that is killed.
    pub(super) fn kill(&mut self, owner: usize) {
        let channels: Vec<u64> = self
            .channels
            .iter()
            .filter(|(_, it)| it.owner == Some(owner))
            .map(|(number, _)| *number)
            .collect();
        for number in channels {
            let ids: Vec<u64> =
                self.ends.iter().filter(|(_, end)| end.channel == number).map(|(id, _)| *id).collect();
            for id in ids {
                let Some(end) = self.ends.get(&id) else { continue };
                let (queue, peer) = (end.queue, end.peer);
                self.fail(queue);
                let lost = self.lost_ends_permille;
                if peer != 0 && !self.random.chance(lost) {
                    let at = self.arrival(id);
                    self.tell(peer, (event::DISCONNECTED, 0), None, Some(at));
                }
                for window in self.windows.values_mut() {
                    window.bound = window.bound.filter(|bound| bound.queue != queue);
                }
                self.pairs.remove(&queue);
                self.ends.remove(&id);
                self.dead.extend([queue, id]);
            }
            self.channels.remove(&number);
            self.dead.insert(number);
        }
    }

    /// Whether a peer, or a request that is under way, may reach any of this memory.
    pub(super) fn reaches(&self, start: u64, len: u64) -> bool {
        let overlaps = |from: u64, size: u64| from < start + len && start < from + size;
        let alive = |queue: &u64| self.pairs.get(queue).is_some_and(|pair| !pair.failed);
        let mut bounds = self.windows.values().filter_map(|window| window.bound);
        let mut works = self.pairs.values().filter(|pair| !pair.failed).flat_map(|pair| &pair.works);
        bounds.any(|bound| alive(&bound.queue) && overlaps(bound.start, bound.len))
            || works.any(|work| work.segments.iter().any(|it| overlaps(it.address, u64::from(it.len))))
    }
}
