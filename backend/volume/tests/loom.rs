//! What reactors share of an array, in all interleavings that there are of two or three of them.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p hawser-volume --release --test loom`; without that flag there is nothing here.
#![cfg(loom)]

use hawser_volume::raid::{AtomicBits, Guards, Level, Mode, Set, SetConfig, Slow};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

fn mirror() -> Arc<Set> {
    set(Level::Raid1, 2)
}

fn set(level: Level, members: usize) -> Arc<Set> {
    let set = Set::new(SetConfig {
        level,
        first_member: 0,
        member_bytes: vec![1 << 20; members],
        strip_bytes: 4096,
        extent_bytes: 64 << 10,
        region_bytes: 64 << 10,
        data_offset: 0,
        parity_log: (0, 1024),
    });
    Arc::new(set.expect("a small set"))
}

fn doubtful(set: &Set) -> &AtomicBits {
    &set.parity().expect("a level with parity").doubtful
}

/// A region is declared the same, while another thread marks it, and does `more` to it.
fn mark_while_declared_same(set: &Arc<Set>, more: impl FnOnce(&Set) + 'static) {
    let marks = Arc::new(AtomicU64::new(0));
    set.unsynced.set(0);
    let seen = marks.load(Ordering::SeqCst);
    let writer = {
        let (set, marks) = (Arc::clone(set), Arc::clone(&marks));
        thread::spawn(move || {
            marks.fetch_add(1, Ordering::SeqCst);
            set.unsynced.set(0);
            more(&set);
        })
    };
    // The copying is over.
    let _ = set.declare_same(0, || marks.load(Ordering::SeqCst) == seen);
    writer.join().unwrap();
}

/// A region is copied and its mark taken away, while a write that failed on a member marks it again: the mark stays, whichever comes
/// first. `mark_unsynced` does just this.
#[test]
fn a_mark_that_is_set_while_its_region_is_declared_the_same_is_not_lost() {
    loom::model(|| {
        let set = mirror();
        mark_while_declared_same(&set, |_| {});
        assert!(set.unsynced.get(0));
    });
}

/// A doubt was taken away after the look whether the region's mark had come back: a stripe that another reactor left half written in between
/// stayed marked, and what is lost of it was computed all the same. `doubt` does just this; the region was doubtful before, or not.
#[test]
fn a_doubt_that_comes_while_its_region_is_declared_the_same_is_not_lost() {
    for was_doubtful in [false, true] {
        loom::model(move || {
            let set = set(Level::Raid5, 3);
            if was_doubtful {
                doubtful(&set).set(0);
            }
            mark_while_declared_same(&set, |set| doubtful(set).set(0));
            assert!(set.unsynced.get(0) && doubtful(&set).get(0));
        });
    }
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

/// Two change a stripe, one of them without the log: never at once, and who comes second sees what the first has done.
#[test]
fn a_stripe_is_changed_by_one_at_a_time() {
    loom::model(|| {
        let guards = Arc::new(Guards::default());
        let stripe = Arc::new(UnsafeCell::new(0_u64));
        // SAFETY: whoever has the stripe is the only one; loom ends the test where that is not so.
        let change = |stripe: &UnsafeCell<u64>| stripe.with_mut(|bytes| unsafe { *bytes += 1 });
        let other = {
            let (guards, stripe) = (Arc::clone(&guards), Arc::clone(&stripe));
            thread::spawn(move || {
                let is_ours = guards.take(1);
                if is_ours {
                    change(&stripe);
                    guards.give_back(1);
                }
                u64::from(is_ours)
            })
        };
        let is_ours = guards.take_unlogged(1);
        if is_ours {
            change(&stripe);
            guards.give_back(1);
        }
        let changes = u64::from(is_ours) + other.join().unwrap();
        assert!(changes > 0);
        // SAFETY: the other thread has ended.
        stripe.with(|bytes| assert_eq!(unsafe { *bytes }, changes));
    });
}

/// While an entry about a stripe is in the log, nobody changes it without the log: who can take it so sees that the entry is released.
#[test]
fn who_takes_a_stripe_without_the_log_finds_nothing_in_it() {
    loom::model(|| {
        let guards = Arc::new(Guards::default());
        // How many entries an opening would put in place.
        let entries = Arc::new(UnsafeCell::new(0_u64));
        let logger = {
            let (guards, entries) = (Arc::clone(&guards), Arc::clone(&entries));
            thread::spawn(move || {
                if !guards.take(1) {
                    return;
                }
                guards.is_to_be_logged(1);
                // SAFETY: as long as the stripe is ours, or counted as logged, nobody else looks; loom watches.
                entries.with_mut(|entries| unsafe { *entries = 1 });
                guards.give_back(1);
                // Flushed, and the members know.
                // SAFETY: as above.
                entries.with_mut(|entries| unsafe { *entries = 0 });
                guards.is_released(1);
            })
        };
        if guards.take_unlogged(1) {
            // SAFETY: the stripe is ours, and nothing about it is in the log.
            entries.with(|entries| assert_eq!(unsafe { *entries }, 0));
            guards.give_back(1);
        }
        logger.join().unwrap();
        assert!(guards.take_unlogged(1));
    });
}
