//! The kernel without SIMD: eight bytes at a time in a `u64`. For every processor, and to hold the others against: it shares
//! neither their loops nor their tables.

use super::{Kernel, MultiplyInto, Operation, Pq, Solve, Xor, XorInto};
use crate::parity::field::REDUCED;

pub(super) static SCALAR: Kernel = Kernel { name: "scalar", has: || true, run };

const WORD_BYTES: usize = size_of::<u64>();
const ONES: u64 = u64::from_ne_bytes([1; WORD_BYTES]);

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("a block is whole words"))
}

fn set(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..at + WORD_BYTES].copy_from_slice(&word.to_le_bytes());
}

/// 2 times each byte.
fn double(word: u64) -> u64 {
    let carried = (word >> 7) & ONES;
    ((word << 1) & !ONES) ^ (carried * u64::from(REDUCED))
}

/// `factor` times each byte: the sum of its doublings that the factor's bits select.
fn multiply(word: u64, factor: u8) -> u64 {
    (0..8).rev().fold(0, |sum, bit| double(sum) ^ if factor >> bit & 1 != 0 { word } else { 0 })
}

/// p and q of the data.
fn sums(data: &[Option<&[u8]>], at: usize) -> (u64, u64) {
    data.iter().rev().fold((0, 0), |(p, q), data| {
        let word = data.map_or(0, |data| word(data, at));
        (p ^ word, double(q) ^ word)
    })
}

fn run(operation: Operation<'_>) {
    match operation {
        Operation::Xor(Xor { data, p }) => {
            for at in (0..p.len()).step_by(WORD_BYTES) {
                set(p, at, data.iter().fold(0, |sum, data| sum ^ word(data, at)));
            }
        }
        Operation::Pq(Pq { data, p, q }) => {
            for at in (0..p.len()).step_by(WORD_BYTES) {
                let (p_word, q_word) = sums(data, at);
                set(p, at, p_word);
                set(q, at, q_word);
            }
        }
        Operation::Solve(Solve { data, p, q, matrix, first, mut second }) => {
            for at in (0..first.len()).step_by(WORD_BYTES) {
                let (mut p_word, mut q_word) = sums(data, at);
                p_word ^= p.map_or(0, |p| word(p, at));
                q_word ^= q.map_or(0, |q| word(q, at));
                let row = |[by_p, by_q]: [u8; 2]| multiply(p_word, by_p) ^ multiply(q_word, by_q);
                set(first, at, row(matrix[0]));
                if let Some(second) = second.as_deref_mut() {
                    set(second, at, row(matrix[1]));
                }
            }
        }
        Operation::XorInto(XorInto { delta, p }) => {
            for at in (0..p.len()).step_by(WORD_BYTES) {
                set(p, at, word(p, at) ^ word(delta, at));
            }
        }
        Operation::MultiplyInto(MultiplyInto { factor, delta, q }) => {
            for at in (0..q.len()).step_by(WORD_BYTES) {
                set(q, at, word(q, at) ^ multiply(word(delta, at), factor));
            }
        }
    }
}
