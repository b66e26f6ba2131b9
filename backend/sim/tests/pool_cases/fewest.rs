//! A part of a stripe is changed by reading what is overwritten and the parities, or all that is not overwritten, whichever is less: counted at each
//! member, where it cannot be hidden.
//!
//! ```text
//!   D0' D1' D2  D3  P      overwrites 2 of 4: reads D2 and D3 (2), not D0, D1 and P (3)
//! ```

use super::*;
use orders::noise;
use promises::{Seen, as_devices};

const STRIP: usize = 16 << 10;
/// So that parity is on several members.
const STRIPES: usize = 4;
const SHAPES: [(Level, u8); 10] = [
    (Level::Raid5, 3),
    (Level::Raid5, 4),
    (Level::Raid5, 5),
    (Level::Raid5, 8),
    (Level::Raid5, 32),
    (Level::Raid6, 4),
    (Level::Raid6, 5),
    (Level::Raid6, 6),
    (Level::Raid6, 9),
    (Level::Raid6, 32),
];

/// Bytes of data and parity that a member was asked for.
#[derive(Clone, Copy, Debug, Default)]
struct Bytes {
    read: usize,
    written: usize,
}

struct Story {
    scene: Scene,
    pool: Pool,
    seen: Seen,
    _held: Vec<Arc<HeldDevice>>,
    what: String,
    data: usize,
    parities: usize,
    /// What the volume has.
    want: Vec<u8>,
}

impl Story {
    /// Some stripes that are written, each of them whole.
    fn new(level: Level, members: u8) -> Story {
        let mut scene = Scene::sized(90, members, 16 << 11);
        scene.create(level);
        let (held, seen) = scene.watched();
        let pool = scene.open_quietly(as_devices(&held), |_| {}).unwrap();
        let parities = usize::from(level.parities());
        let data = usize::from(members) - parities;
        let want = noise(1, STRIPES * data * STRIP);
        scene.ask(pool.create_volume("v", want.len() as u64)).unwrap();
        scene.write(&pool, "v", 0, &want);
        scene.flush(&pool, "v");
        Story { scene, pool, seen, _held: held, what: format!("{level} of {members}"), data, parities, want }
    }

    /// Writes, and what each member was asked for.
    fn write(&mut self, at: usize, len: usize) -> Vec<Bytes> {
        self.seen.lock().unwrap().clear();
        let bytes = noise((at + len) as u64, len);
        self.scene.write(&self.pool, "v", at as u64, &bytes);
        self.want[at..at + len].copy_from_slice(&bytes);
        let mut members = vec![Bytes::default(); self.data + self.parities];
        for (member, is_write, _, len) in self.seen.lock().unwrap().drain(..) {
            let bytes = &mut members[member];
            *(if is_write { &mut bytes.written } else { &mut bytes.read }) += usize::try_from(len).unwrap();
        }
        members
    }

    /// What is there, and its parity, are right.
    fn ends(mut self) {
        assert!(self.scene.read(&self.pool, "v", 0, self.want.len()) == self.want, "{}", self.what);
        assert_eq!(self.scene.differing(&self.pool), 0, "{}", self.what);
        self.scene.ask(self.pool.close()).unwrap();
    }
}

/// Whole strips of a stripe, any number of them, at its beginning and at its end.
#[test]
fn so_many_strips_of_a_stripe_are_written_with_the_fewest_reads() {
    for (level, members) in SHAPES {
        let mut story = Story::new(level, members);
        let (data, parities) = (story.data, story.parities);
        for count in 1..=data {
            for first in [0, data - count] {
                let at = (count % STRIPES * data + first) * STRIP;
                let members = story.write(at, count * STRIP);
                let what = format!("{}, {count} strips from {first} on: {members:?}", story.what);
                let is_whole = |bytes: usize| bytes == 0 || bytes == STRIP;
                assert!(members.iter().all(|it| is_whole(it.read) && is_whole(it.written)), "{what}");
                let reads = members.iter().filter(|it| it.read > 0).count();
                let writes = members.iter().filter(|it| it.written > 0).count();
                assert_eq!(writes, count + parities, "{what}");
                let (by_difference, by_rest) = (count + parities, data - count);
                assert_eq!(reads, by_difference.min(by_rest), "{what}");
                // All who are read are written; or none of them is.
                let both = members.iter().filter(|it| it.read > 0 && it.written > 0).count();
                assert!(both == 0 || both == reads, "{what}");
            }
        }
        story.ends();
    }
}

/// Of a part of a strip only those columns are read; of two parts that touch, those of each. Where more is overwritten, the first strip and the last are
/// neither kept nor replaced as a whole: all data has to be known, or all that is touched.
#[test]
fn parts_of_strips_are_written_with_the_fewest_reads() {
    for (level, members) in SHAPES {
        let mut story = Story::new(level, members);
        let (data, parities) = (story.data, story.parities);
        let fewest = |count: usize, rest: usize| (count + parities).min(rest);
        let read = |members: &[Bytes]| members.iter().map(|it| it.read).sum::<usize>();
        let one = story.write(STRIP + 1024, 4096);
        assert_eq!(read(&one), 4096 * fewest(1, data - 1), "{}: {one:?}", story.what);
        let two = story.write(STRIP - 1024, 2048);
        assert_eq!(read(&two), 2 * 1024 * fewest(1, data - 1), "{}: {two:?}", story.what);
        for count in 2..=data {
            let members = story.write(512, count * STRIP - 1024);
            let want = STRIP * fewest(count, data - count + 2);
            assert_eq!(read(&members), want, "{}, {count} strips: {members:?}", story.what);
        }
        story.ends();
    }
}
