//! What is lost, from what is left.
//!
//! With p and q, the sums of the data that is known and of the parities that are known, what is missing is a matrix times them:
//!
//! ```text
//!   missing    p + q are of        so that                    results
//!   P, Q       data                                           P = p                    Q = q
//!   Dx, Q      data, P             p = Dx                     Dx = p                   Q = 2^x·p + q
//!   Dx, P      data, Q             q = 2^x·Dx                 Dx = 2^-x·q              P = p + 2^-x·q
//!   Dx, Dy     data, P, Q          p = Dx + Dy                Dx = 2^y·i·p + i·q       Dy = 2^x·i·p + i·q
//!                                  q = 2^x·Dx + 2^y·Dy        with i = 1 / (2^x + 2^y)
//! ```

use super::field::{inverse, power, product};
use super::{DATA_MAX, Kernel};
use std::fmt;

/// A strip of a stripe, or the same part of each.
#[derive(Debug)]
pub enum Shard<'a> {
    /// What stands there.
    Known(&'a [u8]),
    /// Not known; what was there shall come here, whatever this holds now.
    Wanted(&'a mut [u8]),
    /// Not known, nor is it needed.
    Lost,
}

/// More of a stripe is missing than its parities can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unrecoverable;

impl fmt::Display for Unrecoverable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("more of a stripe is missing than it has parities")
    }
}

impl std::error::Error for Unrecoverable {}

/// What is to be written, if anything.
type Out<'a> = Option<&'a mut [u8]>;

/// A parity: if it is known, and where it shall come.
fn parity<'a>(shard: Option<&'a mut Shard<'_>>) -> (Option<&'a [u8]>, Out<'a>) {
    match shard {
        Some(Shard::Known(bytes)) => (Some(bytes), None),
        Some(Shard::Wanted(bytes)) => (None, Some(bytes)),
        Some(Shard::Lost) | None => (None, None),
    }
}

pub(super) fn recover(
    kernel: &Kernel,
    shards: &mut [Shard<'_>],
    parities: usize,
) -> Result<(), Unrecoverable> {
    assert!(
        matches!(parities, 1 | 2) && (1..=DATA_MAX).contains(&shards.len().wrapping_sub(parities)),
        "{} shards, {parities} of them parities",
        shards.len()
    );
    let count = shards.len() - parities;
    let (data, checks) = shards.split_at_mut(count);
    let mut known = [None; DATA_MAX];
    // By index, with what is wanted of it: at most one for each parity.
    let mut missing: [Option<(usize, Out<'_>)>; 2] = [None, None];
    let mut places = missing[..parities].iter_mut();
    for (index, shard) in data.iter_mut().enumerate() {
        let wanted = match shard {
            Shard::Known(bytes) => {
                known[index] = Some(&**bytes);
                continue;
            }
            Shard::Wanted(bytes) => Some(&mut **bytes),
            Shard::Lost => None,
        };
        *places.next().ok_or(Unrecoverable)? = Some((index, wanted));
    }
    let known = &known[..count];
    let mut checks = checks.iter_mut();
    let (p, p_out) = parity(checks.next());
    let (q, q_out) = parity(checks.next());

    match (missing, p, q) {
        ([None, None], ..) => match (p_out, q_out) {
            (Some(p_out), Some(q_out)) => kernel.sums(known, p_out, q_out),
            (Some(p_out), None) => sum(kernel, known, None, p_out),
            (None, q_out) => solve(kernel, known, None, None, [(q_out, [0, 1]), (None, [0, 0])]),
        },
        ([Some((_, Some(x_out))), None], Some(p), _) if q_out.is_none() => sum(kernel, known, Some(p), x_out),
        ([Some((x, x_out)), None], Some(p), _) => {
            solve(kernel, known, Some(p), None, [(x_out, [1, 0]), (q_out, [power(x), 1])]);
        }
        ([Some((x, x_out)), None], None, Some(q)) => {
            let factor = inverse(power(x));
            solve(kernel, known, None, Some(q), [(x_out, [0, factor]), (p_out, [1, factor])]);
        }
        ([Some((x, x_out)), Some((y, y_out))], Some(p), Some(q)) => {
            let (x, y) = (power(x), power(y));
            let factor = inverse(x ^ y);
            let (for_x, for_y) = ([product(y, factor), factor], [product(x, factor), factor]);
            solve(kernel, known, Some(p), Some(q), [(x_out, for_x), (y_out, for_y)]);
        }
        _ => return Err(Unrecoverable),
    }
    Ok(())
}

/// The sum of the data that is known, and of P.
fn sum(kernel: &Kernel, known: &[Option<&[u8]>], p: Option<&[u8]>, out: &mut [u8]) {
    let mut all: [&[u8]; DATA_MAX + 1] = [&[]; DATA_MAX + 1];
    let mut count = 0;
    for bytes in known.iter().flatten().chain(&p) {
        all[count] = bytes;
        count += 1;
    }
    kernel.sum(&all[..count], out);
}

/// Those results that are wanted.
fn solve(
    kernel: &Kernel,
    known: &[Option<&[u8]>],
    p: Option<&[u8]>,
    q: Option<&[u8]>,
    results: [(Out<'_>, [u8; 2]); 2],
) {
    match results {
        [(Some(first), row), (second, other)] => kernel.solve(known, p, q, &[row, other], first, second),
        [(None, _), (Some(only), row)] => kernel.solve(known, p, q, &[row, row], only, None),
        [(None, _), (None, _)] => {}
    }
}
