//! The geometry of stripes beside md's formulas, byte by byte.

use super::tests::Random;
use super::{Level, MEMBERS_MAX, Role, SET_BYTES_MAX, Stripes};

/// What `raid5_compute_sector` says for `ALGORITHM_LEFT_SYMMETRIC`: (row, P, Q, member) of a chunk.
fn md(level: Level, raid_disks: u64, chunk: u64) -> (u64, u64, Option<u64>, u64) {
    if level == Level::Raid5 {
        let data_disks = raid_disks - 1;
        let stripe = chunk / data_disks;
        let pd_idx = data_disks - stripe % raid_disks;
        (stripe, pd_idx, None, (pd_idx + 1 + chunk % data_disks) % raid_disks)
    } else {
        let data_disks = raid_disks - 2;
        let stripe = chunk / data_disks;
        let pd_idx = raid_disks - 1 - stripe % raid_disks;
        let qd_idx = (pd_idx + 1) % raid_disks;
        (stripe, pd_idx, Some(qd_idx), (pd_idx + 2 + chunk % data_disks) % raid_disks)
    }
}

fn all() -> impl Iterator<Item = (Level, u16)> {
    [Level::Raid5, Level::Raid6].into_iter().flat_map(|level| {
        (level.members_min()..=8).chain([13, 16, 31, MEMBERS_MAX]).map(move |members| (level, members))
    })
}

fn stripes(level: Level, members: u16, strip_bytes: u32) -> Stripes {
    Stripes::new(members, level.redundancy(members), strip_bytes).expect("good")
}

/// What stands on the members, row by row: of each member what its strip is, and the chunk if it is data.
type Rows = Vec<Vec<(Role, Option<u64>)>>;

fn model(level: Level, members: u16, rows: u64) -> Rows {
    let parities = u64::from(level.redundancy(members));
    let data = u64::from(members) - parities;
    let mut places = vec![vec![None; usize::from(members)]; usize::try_from(rows).expect("few")];
    for chunk in 0..rows * data {
        let (row, p, q, member) = md(level, members.into(), chunk);
        let row = &mut places[usize::try_from(row).expect("few")];
        let mut put = |member: u64, what| {
            let place = &mut row[usize::try_from(member).expect("few")];
            assert!(place.is_none_or(|there| there == what), "two strips at one place");
            *place = Some(what);
        };
        put(p, (Role::P, None));
        q.into_iter().for_each(|q| put(q, (Role::Q, None)));
        put(member, (Role::Data(u16::try_from(chunk % data).expect("few")), Some(chunk)));
    }
    places.into_iter().map(|row| row.into_iter().map(|place| place.expect("a full row")).collect()).collect()
}

#[test]
fn rows_are_drawn_as_the_format_draws_them() {
    let drawn = |level, members| -> Vec<String> {
        let of = stripes(level, members, 4096);
        let strip = |row, member| match of.role(row, member) {
            Role::Data(index) => (row * u64::from(of.data_strips()) + u64::from(index)).to_string(),
            Role::P => "P".to_owned(),
            Role::Q => "Q".to_owned(),
        };
        (0..4)
            .map(|row| (0..members).map(|member| strip(row, member)).collect::<Vec<_>>().join(" "))
            .collect()
    };
    assert_eq!(drawn(Level::Raid5, 4), ["0 1 2 P", "4 5 P 3", "8 P 6 7", "P 9 10 11"]);
    assert_eq!(drawn(Level::Raid6, 4), ["Q 0 1 P", "2 3 P Q", "5 P Q 4", "P Q 6 7"]);
}

#[test]
fn every_byte_is_where_md_puts_it_and_is_found_there() {
    for (level, members) in all() {
        for strip_bytes in [1, 3, 8, 20] {
            let of = stripes(level, members, strip_bytes);
            let (strip, rows) = (u64::from(strip_bytes), u64::from(members) * 2 + 1);
            assert_eq!(of.stripe_bytes(), strip * u64::from(of.data_strips()));
            for (row, places) in (0..).zip(model(level, members, rows)) {
                for (member, (role, chunk)) in (0..).zip(places) {
                    assert_eq!(of.role(row, member), role, "{level} {members} {row} {member}");
                    match role {
                        Role::P => assert_eq!(of.member_of_p(row), member),
                        Role::Q => assert_eq!(of.member_of_q(row), Some(member)),
                        Role::Data(index) => assert_eq!(of.member_of_data(row, index), member),
                    }
                    assert!(level == Level::Raid6 || of.member_of_q(row).is_none());
                    if let Some(chunk) = chunk {
                        assert_eq!(of.place(chunk), (row, member));
                    }
                    for byte in 0..strip {
                        let (offset, address) = (row * strip + byte, chunk.map(|chunk| chunk * strip + byte));
                        assert_eq!(
                            of.address_of(member, offset),
                            address,
                            "{level} {members} {member} {offset}"
                        );
                        if let Some(address) = address {
                            assert_eq!(of.locate(address), (member, offset, strip - byte));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn chunks_of_the_largest_sets_are_where_md_puts_them() {
    let mut random = Random(11);
    for (level, members) in all() {
        for strip_bytes in [4096, 64 << 10, 1 << 20] {
            let of = stripes(level, members, strip_bytes);
            for _ in 0..200 {
                let chunk = (random.next() % (SET_BYTES_MAX / u64::from(strip_bytes))) >> random.below(30);
                let (row, p, q, member) = md(level, members.into(), chunk);
                assert_eq!(
                    of.place(chunk),
                    (row, u16::try_from(member).expect("few")),
                    "{level} {members} {chunk}"
                );
                assert_eq!(u64::from(of.member_of_p(row)), p);
                assert_eq!(of.member_of_q(row).map(u64::from), q);
            }
        }
    }
}

#[test]
fn touched_parts_are_the_bytes_of_the_range_and_columns_are_what_they_cover() {
    let mut random = Random(12);
    let (mut twice, mut whole) = (0, 0);
    for (level, members) in all() {
        for strip_bytes in [1, 3, 8, 20] {
            let of = stripes(level, members, strip_bytes);
            let (strip, stripe) = (u64::from(strip_bytes), of.stripe_bytes());
            for _ in 0..60 {
                let address = random.next() % (stripe * 3);
                let most = if random.below(2) == 0 { stripe * 3 } else { strip * 2 };
                let len = random.next() % (most + 1);
                let mut next = 0;
                let mut last_row = None;
                for touched in of.touched(address, len) {
                    assert!(last_row.is_none_or(|last| last + 1 == touched.row), "rows in order, each once");
                    last_row = Some(touched.row);
                    assert_eq!((touched.start, touched.row * stripe + touched.from), (next, address + next));
                    let mut covered = vec![false; usize::try_from(strip).expect("small")];
                    for part in touched.parts() {
                        assert_eq!(part.start, next);
                        assert!(part.len > 0 && part.within + part.len <= strip);
                        for byte in 0..part.len {
                            let place = touched.row * strip + part.within + byte;
                            assert_eq!(of.address_of(part.member, place), Some(address + part.start + byte));
                            covered[usize::try_from(part.within + byte).expect("small")] = true;
                        }
                        assert_eq!(of.role(touched.row, part.member), Role::Data(part.index));
                        next += part.len;
                    }
                    assert_eq!(
                        touched.is_whole(),
                        touched.parts().map(|part| part.len).sum::<u64>() == stripe
                    );
                    let columns = touched.columns();
                    let named: Vec<bool> =
                        (0..strip).map(|byte| columns.iter().any(|range| range.contains(&byte))).collect();
                    assert_eq!(named, covered, "{level} {members} {strip}: {len} at {address}");
                    assert!(columns[1].is_empty() || columns[0].end < columns[1].start, "{columns:?}");
                    twice += u32::from(!columns[1].is_empty());
                    whole += u32::from(touched.is_whole());
                }
                assert_eq!(next, len);
            }
        }
    }
    assert!(twice > 20 && whole > 100, "{twice} {whole}: there were such stripes");
}

#[test]
fn sets_that_cannot_be_are_refused_by_name() {
    let refused = |members, parities, strip| Stripes::new(members, parities, strip).expect_err("refused");
    assert_eq!(refused(2, 1, 4096), "raid5 takes 3 to 32 members, not 2");
    assert_eq!(refused(3, 2, 4096), "raid6 takes 4 to 32 members, not 3");
    assert_eq!(refused(33, 2, 4096), "raid6 takes 4 to 32 members, not 33");
    assert_eq!(refused(4, 3, 4096), "stripes have one parity or two, not 3");
    assert_eq!(refused(4, 1, 0), "a strip has at least one byte");
}

#[test]
#[should_panic(expected = "member 4 of 4")]
fn a_member_that_is_not_there_is_our_bug() {
    let _ = stripes(Level::Raid5, 4, 4096).role(0, 4);
}
