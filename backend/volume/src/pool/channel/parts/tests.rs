//! A member that is lost between two parts. The owner may be on another reactor, so that can happen in the middle of one submission; here the
//! member's device does it when it gets the second part.

use super::*;
use crate::pool::bounce::Bounce;
use crate::pool::place::Place;
use crate::pool::{self, Ask, CreateOptions, MemoryTail, OpenOptions, Pool};
use crate::raid::{Level, Mode};
use hawser_block::fake::FakeDevice;
use hawser_block::held::HeldDevice;
use hawser_block::{BlockSize, Channel, Device, Geometry, Operation};
use hawser_runtime::{Event, Reactor, ReactorConfig, Runtime, Source};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const LEN: usize = 1 << 20;
const LOST: u16 = 1;

struct Nothing;

impl Source for Nothing {
    fn poll(&mut self, _: &Runtime, _: &mut Vec<Event>) {}
}

struct Scene {
    reactor: Option<Reactor>,
    channel: Option<Box<dyn Channel>>,
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.channel = self.channel.take().and_then(if_well);
        self.reactor = self.reactor.take().and_then(if_well);
    }
}

/// What does not come to its end is left.
fn if_well<T>(it: T) -> Option<T> {
    match std::thread::panicking() {
        true => {
            std::mem::forget(it);
            None
        }
        false => Some(it),
    }
}

impl Scene {
    fn runtime(&self) -> Runtime {
        self.reactor.as_ref().expect("there until the end").runtime().clone()
    }

    fn step(&mut self) {
        let runtime = self.runtime();
        runtime.enter(|| self.reactor.as_mut().expect("there until the end").step());
    }

    fn ask<T: Send + 'static>(&mut self, ask: Ask<T>) -> T {
        let answer = Rc::new(RefCell::new(None));
        let place = Rc::clone(&answer);
        self.runtime().spawn(async move { *place.borrow_mut() = Some(ask.await) });
        while answer.borrow().is_none() {
            self.step();
        }
        answer.take().expect("it is there").expect("it succeeds")
    }

    /// One request over the first bytes of the volume; how often it has ended, and how.
    fn io(&mut self, operation: Operation, bytes: &Bounce) -> Vec<Completion> {
        let len = bytes.len();
        let blocks = BlockCount(u32::try_from(len / 512).expect("small"));
        let buffers = bytes.buffers(0, len);
        let mut batch = vec![Request { operation, lba: Lba(0), blocks, buffers, token: Token(7) }];
        let mut ended = Vec::new();
        let runtime = self.runtime();
        runtime.enter(|| self.channel.as_mut().expect("opened").submit(&mut batch));
        // What does not end is waited for in vain; what ends twice does so soon.
        let began = Instant::now();
        let mut steps_more = 3;
        while steps_more > 0 && began.elapsed() < Duration::from_secs(5) {
            steps_more -= u32::from(!ended.is_empty());
            self.step();
            self.channel.as_mut().expect("opened").reap(&mut ended);
        }
        ended
    }
}

fn slow(pool: &Pool, class: Class) -> u64 {
    let name = class.name();
    pool.volumes()[0].slow.iter().find(|(other, _)| *other == name).expect("it is counted").1
}

#[test]
fn what_is_left_of_a_write_takes_another_way_when_a_member_is_lost_between_its_parts() {
    for (level, members) in [(Level::Raid5, 3), (Level::Raid6, 4)] {
        let reactor = Reactor::new(ReactorConfig::default()).expect("io_uring");
        let geometry = Geometry { volatile_cache: true, ..Geometry::new(BlockSize::B512, (24 << 20) / 512) };
        let fakes: Vec<_> = (0..members).map(|_| Arc::new(FakeDevice::new(geometry))).collect();
        let fake =
            |member: &Arc<FakeDevice>| Arc::new(HeldDevice::new(Arc::clone(member) as Arc<dyn Device>));
        let held: Vec<_> = fakes.iter().map(fake).collect();
        let devices: Vec<_> = held.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect();
        let mut scene = Scene { reactor: Some(reactor), channel: None };
        let handle = scene.runtime().handle();
        let options = CreateOptions {
            strip_bytes: 16 << 10,
            extent_bytes: 64 << 10,
            region_bytes: 1 << 20,
            log_bytes: 256 << 10,
            metadata_bytes: Some(1 << 20),
            ..CreateOptions::new("p", [9; 16], level)
        };
        scene.ask(pool::create(&handle, devices.clone(), options));
        let tail = Box::new(MemoryTail::default());
        let pool = scene.ask(Pool::open(&handle, devices, OpenOptions::new([7; 16], tail)));
        scene.ask(pool.create_volume("v", 4 << 20));
        let user = scene.runtime().add_source(Rc::new(RefCell::new(Nothing)));
        let device = pool.device("v").expect("just made");
        scene.channel = Some(device.channel(&scene.runtime(), user));
        let write = Operation::Write { fua: false };
        for byte in 1..4 {
            let ended = scene.io(write, &Bounce::holding(&[byte; LEN]));
            assert_eq!(ended, [Completion { token: Token(7), outcome: Ok(()) }], "{level}");
        }
        let before = [Class::Degraded, Class::DeviceFailure].map(|class| slow(&pool, class));
        assert_eq!(before, [0, 0], "{level}: it is hot");

        // The second part never ends at the lost member but by an abort, and what comes after that abort not at all.
        let (shared, lost) = (Arc::clone(&pool.shared), Arc::clone(&fakes[usize::from(LOST)]));
        let (data, mut submissions) = (pool.shared.view().data_offset, 0);
        held[usize::from(LOST)].hold(move |request| {
            if request.operation.is_write() && request.lba.0 << 9 >= data {
                submissions += 1;
                if submissions == 12 {
                    lost.state().hold = true;
                    shared.view().array.set(0).set_mode(LOST, Mode::Away);
                    shared.given_up[usize::from(LOST)].fetch_add(1, Ordering::Release);
                }
            }
            false
        });
        let new: Vec<u8> = (0..LEN).map(|at| u8::try_from(at / 512 % 251).expect("below 251")).collect();
        let ended = scene.io(write, &Bounce::holding(&new));
        assert_eq!(ended, [Completion { token: Token(7), outcome: Ok(()) }], "{level}");
        let after = [Class::Degraded, Class::DeviceFailure].map(|class| slow(&pool, class));
        assert_eq!(after, [1, 1], "{level}: once each");

        let found = Bounce::holding(&[0xEE; LEN]);
        assert_eq!(scene.io(Operation::Read, &found).len(), 1, "{level}");
        assert!(found.bytes(0, LEN) == new, "{level}");
        // Nothing is held any more: neither stripes nor room for copies.
        let ended = scene.io(write, &Bounce::holding(&[4; LEN]));
        assert_eq!(ended, [Completion { token: Token(7), outcome: Ok(()) }], "{level}");
        let place = Place::find(&scene.runtime(), &pool.shared).expect("it is used here");
        assert!(place.begin_copy(64 << 20), "{level}: all of it");
        place.end_copy(64 << 20);
        let set = Arc::clone(pool.shared.view().array.set(0));
        let guards = &set.parity().expect("it has parity").guards;
        for row in 0..100 {
            assert!(guards.take(row), "{level}: row {row}");
            guards.give_back(row);
        }
    }
}
