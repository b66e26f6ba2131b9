//! Parity in shapes at the ends of what can be: strips larger than an entry of the parity log has columns (64 KiB), and sets of 32 members. Everything
//! that stripes do is done to each: whole ones and parts written, members lost, read without them, rebuilt, compared, and found again.

use super::*;
use orders::noise;

/// Level, members, bytes of a strip.
const SHAPES: [(Level, u8, u32); 8] = [
    (Level::Raid5, 3, 256 << 10),
    (Level::Raid6, 4, 256 << 10),
    (Level::Raid5, 3, 1 << 20),
    (Level::Raid6, 5, 1 << 20),
    (Level::Raid5, 32, 16 << 10),
    (Level::Raid6, 32, 16 << 10),
    (Level::Raid5, 32, 64 << 10),
    (Level::Raid6, 32, 64 << 10),
];

struct Story {
    scene: Scene,
    pool: Pool,
    /// What the volume has.
    want: Vec<u8>,
    what: String,
}

impl Story {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        // No request has more than 4 MiB.
        for (part, from) in bytes.chunks(2 << 20).zip((at..).step_by(2 << 20)) {
            let outcome =
                self.scene.io(&self.pool, "v", Operation::Write { fua: false }, from as u64, part).0;
            assert_eq!(outcome, Ok(()), "{}: {from}", self.what);
        }
        self.want[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn reads(&mut self, when: &str) {
        for (part, from) in self.want.clone().chunks(2 << 20).zip((0u64..).step_by(2 << 20)) {
            let found = self.scene.read(&self.pool, "v", from, part.len());
            let differs = found.iter().zip(part).position(|(found, want)| found != want);
            assert_eq!(differs, None, "{} {when}, from {from} on", self.what);
        }
    }

    /// Parts of strips and of stripes, at all kinds of borders.
    fn write_parts(&mut self, strip: usize, data: usize, seed: u64) {
        let stripe = strip * data;
        let starts = [0, 512, strip - 4096, strip / 2 + 1024, stripe - 512, stripe, stripe + strip - 512];
        let lens = [512, 4096, 5 * 512, strip / 2, strip, strip + 8192, stripe - strip];
        for (number, (start, len)) in (seed..).zip(starts.into_iter().zip(lens)) {
            self.write(start, &noise(number, len));
        }
    }
}

impl Scene {
    /// A pool with strips of this size, on so many members of so many blocks.
    pub(crate) fn shaped(level: Level, (members, blocks): (u8, u64), strip_bytes: u32) -> Scene {
        let mut scene = Scene::new(u64::from(members), 0);
        scene.disks = (0..members).map(|number| orders::disk(number, blocks)).collect();
        let options = CreateOptions {
            strip_bytes,
            extent_bytes: 64 << 10,
            region_bytes: 2 << 20,
            log_bytes: 64 << 10,
            metadata_bytes: Some(256 << 10),
            ..CreateOptions::new("p0", [9; 16], level)
        };
        let handle = scene.reactors[0].runtime().handle();
        let created = pool::create(&handle, scene.devices(), options);
        scene.ask(created).unwrap();
        scene
    }
}

#[test]
fn stripes_of_all_shapes_are_written_lost_rebuilt_and_found() {
    for (level, members, strip_bytes) in SHAPES {
        let lost = usize::from(level.parities());
        let (strip, data) = (strip_bytes as usize, usize::from(members) - lost);
        let stripe = strip * data;
        let mut scene = Scene::shaped(level, (members, 16 << 11), strip_bytes);
        let pool = scene.open();
        assert_eq!(pool.view().extent_bytes, stripe as u64);
        let size = 3 * stripe;
        scene.ask(pool.create_volume("v", size as u64)).unwrap();
        let what = format!("{level} of {members}, strips of {strip_bytes}");
        let mut story = Story { scene, pool, want: vec![0; size], what };

        // A part of a new extent; then whole stripes; then parts of them.
        story.write(strip / 2, &noise(1, strip));
        story.write(0, &noise(2, 2 * stripe));
        story.write_parts(strip, data, 10);
        story.reads("complete");

        // The first, or the first and the last.
        let away: Vec<usize> = [0, usize::from(members) - 1][..lost].to_vec();
        for member in &away {
            story.scene.lose(&story.pool, *member);
        }
        story.reads("degraded");
        story.write_parts(strip, data, 20);
        story.write(stripe, &noise(3, 2 * stripe));
        story.reads("written degraded");

        // As after a crash: the log has to hold what was being written.
        story.scene.flush(&story.pool, "v");
        story.write_parts(strip, data, 30);
        let Story { mut scene, pool, want, what } = story;
        drop(pool);
        scene.kill();
        let pool = scene.open_degraded();
        let mut story = Story { scene, pool, want, what };
        story.reads("degraded, after a crash");

        for member in &away {
            story.scene.disks[*member].fail_all(None);
            let disk = Arc::clone(&story.scene.disks[*member]) as Arc<dyn Device>;
            let added = story.pool.add_member(disk);
            story.scene.ask(added).unwrap();
        }
        assert_eq!(story.scene.differing(&story.pool), 0, "{}", story.what);
        story.reads("rebuilt");
        // Others are lost, so that what was rebuilt counts.
        for member in 1..=lost {
            story.scene.lose(&story.pool, member);
        }
        story.reads("without others");
        for member in 1..=lost {
            story.scene.disks[member].fail_all(None);
        }
        assert_eq!(story.scene.differing(&story.pool), 0, "{}", story.what);
        story.scene.ask(story.pool.close()).unwrap();
        story.scene.check();
        story.pool = story.scene.open();
        story.reads("opened again");
    }
}
