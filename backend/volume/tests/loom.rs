//! What reactors share of an array, in all interleavings that there are of two or three of them.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p hawser-volume --release --test loom`; without that flag there is nothing here.
#![cfg(loom)]

use hawser_volume::raid::{AtomicBits, Level, Mode, Set, SetConfig, Slow};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

fn mirror() -> Arc<Set> {
    let set = Set::new(SetConfig {
        level: Level::Raid1,
        first_member: 0,
        member_bytes: vec![1 << 20; 2],
        strip_bytes: 4096,
        extent_bytes: 64 << 10,
        region_bytes: 64 << 10,
        data_offset: 0,
        parity_log: (0, 1024),
    });
    Arc::new(set.expect("a mirror of two"))
}

/// A region is copied and its mark taken away, while a write that failed on a member marks it again: the mark stays, whichever comes
/// first. `resync_region` and `mark_unsynced` do just this.
#[test]
fn a_mark_that_is_set_while_its_region_is_declared_the_same_is_not_lost() {
    loom::model(|| {
        let (bits, marks) = (Arc::new(AtomicBits::new(1)), Arc::new(AtomicU64::new(0)));
        bits.set(0);
        let seen = marks.load(Ordering::SeqCst);
        let writer = {
            let (bits, marks) = (Arc::clone(&bits), Arc::clone(&marks));
            thread::spawn(move || {
                marks.fetch_add(1, Ordering::SeqCst);
                bits.set(0);
            })
        };
        // The copying is over.
        bits.clear(0);
        if marks.load(Ordering::SeqCst) != seen {
            bits.set(0);
        }
        writer.join().unwrap();
        assert!(bits.get(0));
    });
}

/// A window that moves on never lets go of what is in both places, nor of what it has come to when the move is over.
#[test]
fn a_byte_in_the_old_and_the_new_window_is_held_all_the_time() {
    loom::model(|| {
        let set = mirror();
        set.set_window(Some(0..8192));
        let reader = {
            let set = Arc::clone(&set);
            thread::spawn(move || set.in_window(4096, 4096))
        };
        set.set_window(Some(4096..12288));
        assert!(reader.join().unwrap());
        assert!(!set.in_window(0, 4096) && set.in_window(8192, 4096));
    });
}

/// A mark that a writer sees as durable makes visible what was done before it was set; one that is hidden sends writers the slow way.
#[test]
fn a_writer_that_finds_its_region_marked_sees_who_is_in_sync() {
    loom::model(|| {
        let set = mirror();
        set.set_mode(0, Mode::InSync);
        let writer = {
            let set = Arc::clone(&set);
            thread::spawn(move || {
                let piece = set.pieces(0, 4096).next().expect("one piece");
                set.writable(&piece).map(|copies| copies.as_slice().len())
            })
        };
        // The other member is there before the region may be written.
        set.set_mode(1, Mode::Syncing);
        set.intents.set(0);
        match writer.join().unwrap() {
            Ok(copies) => assert_eq!(copies, 2, "a write that goes to one of two"),
            Err(why) => assert_eq!(why, Slow::Intent),
        }
    });
}

/// Of two writers that mark a region as touched, and the owner who looks, none is forgotten.
#[test]
fn touched_regions_are_seen_now_or_the_next_time() {
    loom::model(|| {
        let bits = Arc::new(AtomicBits::new(2));
        let writers: Vec<_> = (0..2)
            .map(|bit| {
                let bits = Arc::clone(&bits);
                thread::spawn(move || bits.mark(bit))
            })
            .collect();
        let now = [bits.take(0), bits.take(1)];
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        let later = [bits.take(0), bits.take(1)];
        assert!((now[0] ^ later[0]) && (now[1] ^ later[1]));
    });
}
