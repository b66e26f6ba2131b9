//! The file in which runs of the simulator add up what they have seen.

#[allow(dead_code, reason = "the runner uses the rest")]
#[path = "runner/sums.rs"]
mod sums;

use std::collections::BTreeMap;
use sums::{Sums, Total};

fn seen(histories: u64, cuts: u64, failed: &[u64]) -> Sums {
    Sums {
        histories,
        scenarios: BTreeMap::from([("power".to_owned(), histories)]),
        counts: BTreeMap::from([("cuts".to_owned(), cuts), (format!("only_{cuts}"), 1)]),
        failed: failed.iter().map(|seed| (*seed, String::new(), String::new())).collect(),
    }
}

#[test]
fn runs_are_added_up_in_a_file_that_says_where_the_next_begins() {
    let path = std::env::temp_dir().join(format!("hawser-sums-{}.toml", std::process::id()));
    let _ = std::fs::remove_file(&path);
    assert_eq!(Total::read(&path), Ok(Total::default()));
    for (sums, next) in [(seen(100, 7, &[42]), 1100), (seen(50, 9, &[]), 1150)] {
        let mut total = Total::read(&path).unwrap();
        total.add(sums, next);
        total.write(&path, "sim pools").unwrap();
    }
    let mut want = seen(150, 16, &[42]);
    want.counts = BTreeMap::from(
        [("cuts", 16), ("only_7", 1), ("only_9", 1)].map(|(name, count)| (name.to_owned(), count)),
    );
    assert_eq!(Total::read(&path), Ok(Total { sums: want, next: Some(1150) }));
    std::fs::write(&path, "seeds = many\n").unwrap();
    assert!(Total::read(&path).unwrap_err().contains("seeds = many"));
    std::fs::remove_file(&path).unwrap();
}
