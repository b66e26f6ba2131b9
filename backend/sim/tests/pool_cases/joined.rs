//! What a guest that writes one block behind the other costs: counted at the members, where it cannot be hidden.

use super::*;
use hawser_block::Request;
use orders::{holds, noise};
use std::sync::Mutex;

/// RAID 5 of three: two strips of data to a stripe.
const STRIP: usize = 16 << 10;
const STRIPE: usize = 2 * STRIP;

/// What members were asked for since it was last looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    data_reads: u64,
    data_bytes: u64,
    /// Of entries in the parity logs.
    log_bytes: u64,
}

struct Story {
    scene: Scene,
    pool: Pool,
    count: Arc<Mutex<Count>>,
    _held: Vec<Arc<HeldDevice>>,
}

impl Story {
    /// A volume that has nothing yet, in a pool where whole stripes are being written.
    fn new(seed: u64) -> Story {
        let mut scene = Scene::sized(seed, 3, 16 << 11);
        scene.create(Level::Raid5);
        let layout = {
            let state = scene.disks[0].state();
            Superblock::decode(&state.content.get(4096..8192)).unwrap().unwrap().layout
        };
        // Behind the two pages of the header.
        let (log, data) = (layout.parity_log_offset() + 8192, layout.data_offset());
        let held: Vec<_> =
            scene.devices().into_iter().map(|device| Arc::new(HeldDevice::new(device))).collect();
        let count = Arc::<Mutex<Count>>::default();
        for device in &held {
            let count = Arc::clone(&count);
            device.hold(move |request: &Request| {
                let (at, len) = (request.lba.0 << 9, u64::from(request.blocks.0) << 9);
                let mut count = count.lock().unwrap();
                match request.operation {
                    Operation::Write { .. } if at >= data => count.data_bytes += len,
                    Operation::Write { .. } if at >= log => count.log_bytes += len,
                    Operation::Read if at >= data => count.data_reads += 1,
                    _ => {}
                }
                false
            });
        }
        let devices = held.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect();
        let pool = scene.open_quietly(devices, |_| {}).unwrap();
        scene.ask(pool.create_volume("v", 4 << 20)).unwrap();
        // Marks, and the flag of whole stripes.
        scene.write(&pool, "v", 2 << 20, &noise(1, STRIPE));
        let mut story = Story { scene, pool, count, _held: held };
        story.take();
        story
    }

    fn take(&mut self) -> Count {
        std::mem::take(&mut *self.count.lock().unwrap())
    }

    /// Writes that are all under way at once, in this order.
    fn write_at_once(&mut self, at: usize, bytes: &[u8], each: usize) {
        let client = Rc::new(Client::new(self.scene.reactors[0].runtime(), &self.pool.device("v").unwrap()));
        let ended = Rc::new(RefCell::new(0));
        let parts = bytes.chunks(each).zip((at..).step_by(each));
        let count = parts.clone().count();
        for (part, from) in parts {
            let (client, ended, part) = (Rc::clone(&client), Rc::clone(&ended), part.to_vec());
            self.scene.reactors[0].runtime().spawn(async move {
                let write = Operation::Write { fua: false };
                assert_eq!(client.io(write, from as u64, part).await.0, Ok(()));
                *ended.borrow_mut() += 1;
            });
        }
        let done = || *ended.borrow() == count;
        let scene = &mut self.scene;
        scene.world.run(&mut scene.reactors, Duration::from_secs(10), done).expect("they end");
    }
}

/// A guest with a queue writes block behind block over what is there. Whatever waits for a stripe is one change: the first of a stripe is a part of it, or
/// two are, and the rest of it waits for them, so each stripe is in the log once or twice, not once for each block.
#[test]
fn blocks_that_wait_for_their_stripe_are_written_as_one() {
    holds("waiting_not_joined", |seed| {
        let mut story = Story::new(seed);
        let len = 8 * STRIPE;
        story.scene.write(&story.pool, "v", 0, &noise(2, len));
        story.take();
        let new = noise(3, len);
        story.write_at_once(0, &new, 4096);
        let cost = story.take();
        story.scene.is_one_of(&story.pool, 0, &[&new])?;
        // Each entry: a page, the columns of data and of parity; on two members.
        let stripes = (len / STRIPE) as u64;
        let whole = stripes * (STRIPE + STRIP) as u64;
        let blocks = (len / 4096) as u64;
        match cost {
            // Each block by itself would be written with its parity, which is as much again: 2 bytes for each, instead of 1.5.
            Count { data_bytes, .. } if data_bytes > whole + stripes * 8192 => {
                Err(format!("{blocks} blocks of {stripes} stripes cost {cost:?}"))
            }
            Count { log_bytes, .. } if log_bytes > stripes * 2 * (4096 + 2 * 8192) => {
                Err(format!("{blocks} blocks of {stripes} stripes cost {cost:?}"))
            }
            _ => Ok(()),
        }
    });
}

/// A new extent that is written sequentially: nothing is read, nothing is logged, and members get its data and one strip of parity for each stripe.
#[test]
fn a_new_extent_that_is_written_sequentially_costs_full_stripes_only() {
    holds("whole_stripes_logged", |seed| {
        for each in [STRIPE, 4 * STRIPE, 32 * STRIPE] {
            let mut story = Story::new(seed);
            let data = noise(4, 1 << 20);
            for (part, at) in data.chunks(each).zip((0u64..).step_by(each)) {
                story.scene.write(&story.pool, "v", at, part);
            }
            let cost = story.take();
            story.scene.is_one_of(&story.pool, 0, &[&data])?;
            let want =
                Count { data_bytes: (data.len() / STRIPE * (STRIPE + STRIP)) as u64, ..Count::default() };
            if cost != want {
                return Err(format!("writes of {each} bytes cost {cost:?} instead of {want:?}"));
            }
        }
        Ok(())
    });
}
