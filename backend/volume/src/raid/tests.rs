//! Geometry beside a model that places one strip after the other, by hand; state beside tables.

use super::{COPIES_MAX, Copy, Level, Mode, PIECE_BYTES_MAX, Piece, Set, SetConfig, Slow};
use std::collections::BTreeSet;

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        u32::try_from(self.next() % u64::from(bound)).expect("below a u32")
    }

    fn below_u64(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

const FIRST: u16 = 5;

fn config(level: Level, member_bytes: &[u64], strip_bytes: u32, extent_bytes: u64) -> SetConfig {
    SetConfig {
        level,
        first_member: FIRST,
        member_bytes: member_bytes.to_vec(),
        strip_bytes,
        extent_bytes,
        region_bytes: u64::from(strip_bytes) * 2,
        data_offset: 1 << 20,
        parity_log: (0, 1024),
    }
}

/// The copies of each data byte, in order: (member in the set, offset).
type Places = Vec<Vec<(u16, u64)>>;

/// Places strips one by one, as md's documentation tells it, until no more fit; then cuts off what is no whole extent.
fn model(config: &SetConfig) -> Places {
    let strip = u64::from(config.strip_bytes);
    let mut strips_of: Vec<u64> = config.member_bytes.iter().map(|bytes| bytes / strip).collect();
    if config.level != Level::Linear {
        let least = *strips_of.iter().min().expect("members");
        strips_of.fill(least);
    }
    let members = u16::try_from(strips_of.len()).expect("few");
    // Every position in the order in which data comes to it.
    let mut positions: Vec<(u16, u64)> = Vec::new();
    if config.level == Level::Linear {
        for member in 0..members {
            (0..strips_of[usize::from(member)]).for_each(|row| positions.push((member, row)));
        }
    } else {
        for row in 0..strips_of[0] {
            (0..members).for_each(|member| positions.push((member, row)));
        }
    }
    // What is parity is no place for data; what is left of a row is in the order that begins behind it.
    let parities = config.level.parities();
    if parities > 0 {
        positions.sort_by_key(|(member, row)| {
            let p = members - 1 - u16::try_from(row % u64::from(members)).expect("few");
            (*row, (member + members - p) % members)
        });
        let is_data = |at: usize| at % usize::from(members) >= usize::from(parities);
        positions = (0..positions.len()).filter(|at| is_data(*at)).map(|at| positions[at]).collect();
    }
    let copies = match config.level {
        Level::Linear | Level::Raid0 | Level::Raid5 | Level::Raid6 => 1,
        Level::Raid1 => usize::from(members),
        _ => 2,
    };
    let mut places = Places::new();
    for strip_copies in positions.chunks_exact(copies) {
        for byte in 0..strip {
            places.push(strip_copies.iter().map(|(member, row)| (*member, row * strip + byte)).collect());
        }
    }
    let whole = places.len() as u64 / config.extent_bytes * config.extent_bytes;
    places.truncate(usize::try_from(whole).expect("small"));
    places
}

/// Many small configurations, and some of real strips.
fn configs() -> Vec<SetConfig> {
    let mut configs = Vec::new();
    let mut random = Random(1);
    for level in Level::ALL {
        for members in level.members_min()..=level.members_max().min(8) {
            for strip in [1, 3, 4, 7, 8, 12, 64, 4096, 5000] {
                for rows in [1, 2, 3, 5, 8] {
                    if strip >= 4096 && rows > 3 {
                        continue;
                    }
                    let strip_bytes = u64::from(strip);
                    let member_bytes: Vec<u64> = (0..members)
                        .map(|_| strip_bytes * rows + random.below_u64(strip_bytes * 2))
                        .collect();
                    let stripe = strip_bytes * u64::from(members - level.parities());
                    let extents = match level.parities() {
                        0 => [1, strip_bytes, strip_bytes * 2 + 1],
                        _ => [stripe, stripe, stripe * 2],
                    };
                    for extent in extents {
                        if level.parities() > 0 && extent > stripe * rows {
                            continue;
                        }
                        if level.parities() > 0 || extent <= strip_bytes * rows {
                            configs.push(config(level, &member_bytes, strip, extent));
                        }
                    }
                }
            }
        }
    }
    configs
}

fn checked(piece: &Piece, first: u64) -> u64 {
    assert_eq!(piece.start, first, "pieces follow one another");
    assert!(piece.len > 0);
    u64::from(piece.len)
}

fn copies_at(piece: &Piece, byte: u64) -> Vec<(u16, u64)> {
    piece.copies.as_slice().iter().map(|copy| (copy.member - FIRST, copy.offset + byte)).collect()
}

#[test]
fn pieces_are_where_the_model_puts_every_byte() {
    let mut random = Random(2);
    for config in configs() {
        let set = Set::new(config.clone()).expect("good");
        let places = model(&config);
        let total = places.len() as u64;
        assert_eq!(
            (set.data_bytes(), u64::from(set.extents())),
            (total, total / config.extent_bytes),
            "{config:?}"
        );

        let mut ranges = vec![(0, total), (total, 0)];
        for _ in 0..20 {
            let address = random.below_u64(total);
            ranges.push((
                address,
                1 + random.below_u64((total - address).min(3 * u64::from(config.strip_bytes))),
            ));
        }
        for (address, len) in ranges {
            let mut done = 0;
            for piece in set.pieces(address, len) {
                let piece_len = checked(&piece, done);
                for byte in 0..piece_len {
                    let place = usize::try_from(address + done + byte).expect("small");
                    assert_eq!(copies_at(&piece, byte), places[place], "{config:?} {address} {len}");
                }
                let next = address + done + piece_len;
                if matches!(config.level, Level::Linear | Level::Raid1) && next < address + len {
                    let next = &places[usize::try_from(next).expect("small")];
                    assert_ne!(copies_at(&piece, piece_len), *next, "as long as possible");
                }
                done += piece_len;
            }
            assert_eq!(done, len);
        }
    }
}

#[test]
fn no_two_bytes_share_a_place_and_copies_are_on_different_members() {
    for config in configs() {
        let set = Set::new(config.clone()).expect("good");
        let mut used: Vec<Vec<bool>> = config
            .member_bytes
            .iter()
            .map(|bytes| vec![false; usize::try_from(*bytes).expect("small")])
            .collect();
        for piece in set.pieces(0, set.data_bytes()) {
            let members: BTreeSet<u16> = piece.copies.as_slice().iter().map(|copy| copy.member).collect();
            assert_eq!(members.len(), piece.copies.len());
            let expected = match config.level {
                Level::Linear | Level::Raid0 | Level::Raid5 | Level::Raid6 => 1,
                Level::Raid1 => config.member_bytes.len(),
                _ => 2,
            };
            assert_eq!(members.len(), expected);
            for copy in piece.copies.as_slice() {
                assert!(copy.offset + u64::from(piece.len) <= set.member_rows_bytes());
                let start = usize::try_from(copy.offset).expect("small");
                // Slicing checks that it is inside the member.
                for place in &mut used[usize::from(copy.member - FIRST)][start..start + piece.len as usize] {
                    assert!(!std::mem::replace(place, true), "{config:?}: {copy:?} is used twice");
                }
            }
        }
    }
}

#[test]
fn pieces_of_member_is_the_inverse_of_pieces() {
    let mut random = Random(4);
    for config in configs() {
        let set = Set::new(config.clone()).expect("good");
        let places = model(&config);
        let mut held: Vec<Vec<Option<usize>>> = config
            .member_bytes
            .iter()
            .map(|bytes| vec![None; usize::try_from(*bytes).expect("small") + 9])
            .collect();
        for (address, copies) in places.iter().enumerate() {
            for (member, offset) in copies {
                held[usize::from(*member)][usize::try_from(*offset).expect("small")] = Some(address);
            }
        }
        for (member, held) in (0..).zip(&held) {
            let total = held.len() as u64;
            let mut ranges = vec![(0, total), (0, u64::MAX), (total, 5), (0, 0)];
            for _ in 0..5 {
                let offset = random.below_u64(total);
                ranges.push((offset, random.below_u64(total - offset + 1)));
            }
            for (offset, len) in ranges {
                let end = offset.saturating_add(len).min(total);
                let mut at = offset;
                let skipped = |from: u64, to: u64| {
                    (from..to).all(|at| held[usize::try_from(at).expect("small")].is_none())
                };
                for piece in set.pieces_of_member(member, offset, len) {
                    let start = offset + piece.start;
                    assert!(
                        start >= at && piece.len > 0 && skipped(at, start),
                        "{config:?} {member} {offset} {len}"
                    );
                    for byte in 0..u64::from(piece.len) {
                        let address = held[usize::try_from(start + byte).expect("small")];
                        let copies = copies_at(&piece, byte);
                        assert_eq!(
                            Some(&copies),
                            address.map(|address| &places[address]),
                            "{config:?} {member}"
                        );
                        assert!(copies.contains(&(member, start + byte)));
                    }
                    at = start + u64::from(piece.len);
                }
                assert!(
                    at <= end.max(offset) && skipped(at, end),
                    "{config:?} {member} {offset} {len} ended at {at}"
                );
            }
            for offset in 0..total {
                let address = held[usize::try_from(offset).expect("small")].map(|address| address as u64);
                assert_eq!(set.address_of(member, offset), address);
            }
        }
    }
}

#[test]
fn data_of_rows_has_all_that_the_rows_hold_and_at_most_a_stripe_more() {
    let mut random = Random(5);
    for config in configs() {
        let set = Set::new(config.clone()).expect("good");
        let places = model(&config);
        for _ in 0..4 {
            let offset = random.below_u64(set.member_rows_bytes() + 2);
            let len = random.below_u64(set.member_rows_bytes() + 2);
            let is_held =
                |copies: &Vec<(u16, u64)>| copies.iter().any(|copy| (offset..offset + len).contains(&copy.1));
            let range = set.data_of_rows(offset, len);
            let first = places.iter().position(is_held).map(|address| address as u64);
            let last = places.iter().rposition(is_held).map(|address| address as u64);
            let (Some(first), Some(last)) = (first, last) else {
                continue;
            };
            let stripe = u64::from(config.strip_bytes) * config.member_bytes.len() as u64;
            assert!(range.start <= first && last < range.end, "{config:?} {offset} {len}");
            // Linear goes up to the end of the last extent where the last member's rows have none left.
            let is_exact = config.level != Level::Linear || range.end < set.data_bytes();
            assert!(first - range.start <= stripe, "{config:?} {offset} {len}");
            assert!(!is_exact || range.end - last <= stripe + 1, "{config:?} {offset} {len}");
            assert!(range.end <= set.data_bytes());
        }
        assert_eq!(set.data_of_rows(0, u64::MAX), 0..set.data_bytes());
        assert!(set.data_of_rows(0, 0).is_empty());
        assert!(set.data_of_rows(set.member_rows_bytes(), 100).is_empty());
    }
}

#[test]
fn raid10_with_three_members_is_what_md_shows() {
    let set = Set::new(config(Level::Raid10, &[30, 30, 30], 10, 10)).expect("good");
    // A1 A1 A2 / A2 A3 A3 / A4 A4 -
    let starts: Vec<_> = set.pieces(0, 40).map(|piece| copies_at(&piece, 0)).collect();
    let expected = [[(0, 0), (1, 0)], [(2, 0), (0, 10)], [(1, 10), (2, 10)], [(0, 20), (1, 20)]];
    assert_eq!(starts, expected);
    assert_eq!((set.extents(), set.regions(), set.member_rows_bytes()), (4, 2, 30));
}

#[test]
fn regions_cover_the_rows_with_any_size() {
    for (region_bytes, regions) in [(1, 96), (7, 14), (32, 3), (33, 3), (96, 1), (1000, 1)] {
        let set =
            Set::new(SetConfig { region_bytes, ..config(Level::Raid1, &[100, 96], 8, 8) }).expect("good");
        assert_eq!((set.regions(), set.region_of(0), set.region_of(95)), (regions, 0, regions - 1));
        assert!((0..96).all(|offset| u64::from(set.region_of(offset)) == offset / region_bytes));
    }
    assert_eq!(Set::new(config(Level::Linear, &[100], 8, 8)).expect("good").regions(), 0);
}

#[test]
fn a_long_piece_is_cut_at_its_limit() {
    let set = Set::new(config(Level::Raid1, &[5 << 30, 5 << 30], 4096, 1 << 20)).expect("good");
    let pieces: Vec<_> = set.pieces(4096, 5 << 19).map(|piece| (piece.start, u64::from(piece.len))).collect();
    let limit = PIECE_BYTES_MAX;
    assert_eq!(pieces, [(0, limit), (limit, limit), (2 * limit, limit / 2)]);
}

#[test]
fn what_makes_no_set_is_refused_by_name() {
    let refused = |config| Set::new(config).expect_err("refused");
    let of = |level, members| config(level, &vec![4096; members], 64, 64);
    assert_eq!(refused(of(Level::Raid5, 2)), "raid5 takes 3 to 32 members, not 2");
    assert_eq!(refused(of(Level::Raid6, 3)), "raid6 takes 4 to 32 members, not 3");
    assert_eq!(refused(of(Level::Raid5, 3)), "extents of 64 bytes are not whole stripes of 128");
    assert_eq!(refused(of(Level::Raid1, 5)), "raid1 takes 2 to 4 members, not 5");
    assert_eq!(refused(of(Level::Linear, 0)), "linear takes 1 to 32 members, not 0");
    assert_eq!(refused(of(Level::Raid10, 33)), "raid10 takes 2 to 32 members, not 33");
    let small = refused(config(Level::Raid0, &[4096, 63], 64, 64));
    assert_eq!(small, "member 1 of the set has 63 bytes for data, less than a strip of 64");
    let small = refused(config(Level::Raid1, &[4096, 4096], 64, 8192));
    assert_eq!(small, "the members hold 4096 bytes, less than an extent of 8192");
    assert!(
        refused(config(Level::Linear, &[1 << 58, 64], 64, 64)).contains("at most 288230376151711744 bytes")
    );
    assert!(refused(config(Level::Linear, &[1 << 40], 64, 64)).contains("17179869184 extents are too many"));
    assert!(refused(config(Level::Linear, &[u64::MAX; 2], 64, 64)).contains("at most"));
    assert!(refused(SetConfig { first_member: u16::MAX, ..of(Level::Raid1, 2) }).contains("can number"));
    assert!(refused(SetConfig { region_bytes: 0, ..of(Level::Raid1, 2) }).contains("at least one byte"));
    let tiny = SetConfig { region_bytes: 1, ..config(Level::Raid1, &[1 << 40; 2], 4096, 1 << 20) };
    assert!(refused(tiny).contains("1099511627776 regions are too many"));
}

#[test]
fn levels_are_named_and_know_their_limits() {
    for level in Level::ALL {
        assert_eq!(level.to_string().parse(), Ok(level));
        assert_eq!(level.is_redundant(), level.redundancy(level.members_max()) > 0);
    }
    let error = "raid7".parse::<Level>().expect_err("refused");
    assert_eq!(error, "\"raid7\" is not a RAID level: one of linear, raid0, raid1, raid10, raid5, raid6");
    assert_eq!(Level::ALL.map(Level::members_min), [1, 2, 2, 2, 3, 4]);
    assert_eq!(Level::ALL.map(Level::members_max), [32, 32, 4, 32, 32, 32]);
    assert_eq!(Level::ALL.map(|level| level.redundancy(4)), [0, 0, 3, 1, 1, 2]);
}

const MODES: [Mode; 3] = [Mode::Away, Mode::Syncing, Mode::InSync];

/// What `choose` says with rotors 0 to 11.
fn chosen(set: &Set, piece: &Piece) -> Result<Vec<Copy>, Slow> {
    (0..12).map(|rotor| set.choose(piece, rotor)).collect()
}

#[test]
fn raid1_choices_and_writes_by_every_mode_and_mark() {
    for members in 2..=COPIES_MAX {
        for combination in 0..3_usize.pow(u32::try_from(members).expect("few")) {
            let set = Set::new(config(Level::Raid1, &vec![64; members], 8, 8)).expect("good");
            let modes: Vec<Mode> = (0..members)
                .map(|at| MODES[combination / 3_usize.pow(u32::try_from(at).expect("few")) % 3])
                .collect();
            for (member, mode) in (0..).zip(&modes) {
                set.set_mode(member, *mode);
                assert_eq!(set.mode(member), *mode);
            }
            // Regions are of 16 bytes: this piece is in the second and the third.
            let piece = set.pieces(24, 16).next().expect("one");
            let of = |wanted: &[Mode]| -> Vec<Copy> {
                let places = (FIRST..).zip(&modes).filter(|(_, mode)| wanted.contains(mode));
                places.map(|(member, _)| Copy { member, offset: 24 }).collect()
            };
            let (readable, written) = (of(&[Mode::InSync]), of(&[Mode::InSync, Mode::Syncing]));
            for marks in 0..64_u8 {
                let has = |bit: u8| marks & (1 << bit) != 0;
                for (bits, first) in [(&set.unsynced, 0), (&set.intents, 2)] {
                    bits.clear_all();
                    (0..2).filter(|at| has(first + at)).for_each(|at| bits.set(1 + u32::from(at)));
                }
                // Marks of other regions do not matter.
                set.unsynced.set(0);
                set.unsynced.set(3);
                let is_held = has(4);
                set.set_window(if is_held {
                    Some(39..40)
                } else if has(5) {
                    Some(40..64)
                } else {
                    None
                });
                set.touched.clear_all();

                let choice = chosen(&set, &piece);
                if readable.is_empty() {
                    assert_eq!(choice, Err(Slow::Degraded));
                } else if readable.len() > 1 && (has(0) || has(1)) {
                    assert_eq!(choice, Err(Slow::Unsynced));
                } else {
                    let choice = choice.expect("readable");
                    for copy in &readable {
                        let times = choice.iter().filter(|chosen| *chosen == copy).count();
                        assert_eq!(times, 12 / readable.len(), "all in turn");
                    }
                }

                let expected = match () {
                    () if readable.is_empty() => Err(Slow::Degraded),
                    () if !(has(2) && has(3)) => Err(Slow::Intent),
                    () if is_held => Err(Slow::Window),
                    () => Ok(written.clone()),
                };
                let copies = set.writable(&piece);
                assert_eq!(copies.map(|copies| copies.as_slice().to_vec()), expected);
                let touched: Vec<u32> = set.touched.iter_set().collect();
                assert_eq!(touched, if expected.is_ok() { vec![1, 2] } else { vec![] });
            }
        }
    }
}

#[test]
fn raid10_copies_in_two_regions_are_both_looked_at() {
    let with = |prepare: &dyn Fn(&Set)| {
        let set =
            Set::new(SetConfig { region_bytes: 8, ..config(Level::Raid10, &[24; 3], 8, 8) }).expect("good");
        (0..3).for_each(|member| set.set_mode(member, Mode::InSync));
        set.intents.set(0);
        set.intents.set(1);
        prepare(&set);
        // Strip 1: the last member's first row, and the first member's second.
        let piece = set.pieces(8, 8).next().expect("one");
        assert_eq!(copies_at(&piece, 0), [(2, 0), (0, 8)]);
        let written = set.writable(&piece).map(|copies| copies.len());
        (chosen(&set, &piece).map(|copies| copies.len()), written, set.touched.to_words()[0])
    };
    assert_eq!(with(&|_| ()), (Ok(12), Ok(2), 0b11));
    for region in 0..2 {
        assert_eq!(with(&|set| set.intents.clear(region)), (Ok(12), Err(Slow::Intent), 0));
        assert_eq!(with(&|set| set.unsynced.set(region)), (Err(Slow::Unsynced), Ok(2), 0b11));
        let row = u64::from(region) * 8;
        assert_eq!(with(&|set| set.set_window(Some(row..row + 1))), (Ok(12), Err(Slow::Window), 0));
    }
    // A member that is away: its region's mark is still needed, its copy is not.
    assert_eq!(with(&|set| set.set_mode(0, Mode::Away)), (Ok(12), Ok(1), 0b11));
    let without = |set: &Set| {
        set.set_mode(0, Mode::Away);
        set.intents.clear(1);
    };
    assert_eq!(with(&without), (Ok(12), Err(Slow::Intent), 0));
    // The one that is left is right by itself; the other member of the set does not matter.
    let alone = |set: &Set| {
        set.set_mode(0, Mode::Away);
        set.unsynced.set_all();
    };
    assert_eq!(with(&alone), (Ok(12), Ok(1), 0b11));
    assert_eq!(with(&|set| set.set_mode(1, Mode::Away)), (Ok(12), Ok(2), 0b11));
}

#[test]
fn levels_without_redundancy_ask_for_the_member_and_the_window_alone() {
    for level in [Level::Linear, Level::Raid0] {
        let set = Set::new(config(level, &[16, 16], 8, 8)).expect("good");
        set.set_window(Some(0..16));
        set.unsynced.set_all();
        set.set_mode(0, Mode::InSync);
        let last = set.data_bytes() - 1;
        let (here, gone) = (set.pieces(0, 1).next().expect("one"), set.pieces(last, 1).next().expect("one"));
        let copy = here.copies.as_slice()[0];
        assert_eq!(chosen(&set, &here), Ok(vec![copy; 12]));
        assert_eq!(set.writable(&here), Err(Slow::Window), "it is being copied");
        set.set_window(None);
        assert_eq!(set.writable(&here), Ok(here.copies));
        for mode in [Mode::Away, Mode::Syncing] {
            set.set_mode(1, mode);
            assert_eq!(chosen(&set, &gone), Err(Slow::Degraded));
            assert_eq!(set.writable(&gone), Err(Slow::Degraded));
        }
        assert!(!set.touched.any());
    }
}

#[test]
fn window_has_what_overlaps_with_it() {
    let set = Set::new(config(Level::Raid1, &[100, 100], 10, 10)).expect("good");
    assert!(!set.in_window(0, 100), "there is none at first");
    for (start, end) in [(0, 10), (20, 30), (5, 95), (0, 100), (99, 100)] {
        set.set_window(Some(start..end));
        for offset in 0..100 {
            for len in 0..=100 - offset {
                let expected = (offset..offset + len).any(|byte| (start..end).contains(&byte));
                assert_eq!(set.in_window(offset, len), expected, "{start}..{end}: {len} at {offset}");
            }
        }
    }
    set.set_window(None);
    assert!(!set.in_window(0, 100));
}

#[test]
fn a_byte_in_the_old_and_the_new_window_is_never_seen_outside() {
    let set = Set::new(config(Level::Raid1, &[1000, 1000], 10, 10)).expect("good");
    set.set_window(Some(0..100));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            for _ in 0..1_000_000 {
                assert!(set.in_window(60, 1));
                assert!(set.in_window(0, 1000), "there is always one");
            }
        });
        for round in 0_u64.. {
            let end = 100 + round % 7 * 100;
            set.set_window(Some(if round % 2 == 0 { 50..end } else { 0..61 }));
            if reader.is_finished() {
                break;
            }
        }
    });
}
