//! Parity: P, which is the sum of a stripe's data strips, and Q, which is their weighted sum; and what is lost, from them.
//!
//! ```text
//!   P = D0 + D1 + D2 + …      Q = D0 + 2·D1 + 4·D2 + … + 2^i·Di + …      over GF(2^8), polynomial 11Dh, as Linux md has it
//! ```
//!
//! Owns: the algebra, byte by byte. Must not know: where strips are (`raid::Stripes`), how they are read and written.
//!
//! All slices of one call are equally long, in whole blocks of [`BLOCK_BYTES`]; they may be a part of the members' strips, the
//! same of each. Memory that a guest can change while it is summed gives sums of nothing: callers have private copies.
//!
//! Invariants: nothing is allocated; whatever can be computed from what is known, [`recover()`] computes.

mod field;
mod kernels;
mod recover;
#[cfg(test)]
mod tests;

pub use kernels::{BLOCK_BYTES, Kernel, available, chosen};
pub use recover::{Shard, Unrecoverable};

use field::power;

/// The most data strips in a stripe: all members but one.
pub const DATA_MAX: usize = crate::raid::MEMBERS_MAX as usize - 1;

/// P of `data`.
pub fn xor(data: &[&[u8]], p: &mut [u8]) {
    chosen().xor(data, p);
}

/// P and Q of `data`, which is all of the stripe's, in order.
pub fn pq(data: &[&[u8]], p: &mut [u8], q: &mut [u8]) {
    chosen().pq(data, p, q);
}

/// Adds to P that one data strip changes by `delta`: what it is plus what it will be.
pub fn xor_into(delta: &[u8], p: &mut [u8]) {
    chosen().xor_into(delta, p);
}

/// Adds to Q that the data strip of this index in the stripe changes by `delta`.
pub fn mul_into(index: usize, delta: &[u8], q: &mut [u8]) {
    chosen().mul_into(index, delta, q);
}

/// Computes every [`Shard::Wanted`] of a stripe from its [`Shard::Known`]: `shards` are all of its data strips, in order, then P,
/// then, with two `parities`, Q. What was lost but is not wanted costs nothing; a parity that was not read counts as lost.
///
/// # Errors
/// More is missing than there are parities. Nothing was written.
pub fn recover(shards: &mut [Shard<'_>], parities: usize) -> Result<(), Unrecoverable> {
    chosen().recover(shards, parities)
}

/// The same by a kernel of one's choice: for benches, and to hold one against the other.
impl Kernel {
    /// See [`xor`].
    pub fn xor(&self, data: &[&[u8]], p: &mut [u8]) {
        self.sum(data, p);
    }

    /// See [`pq`].
    pub fn pq(&self, data: &[&[u8]], p: &mut [u8], q: &mut [u8]) {
        assert!(data.len() <= DATA_MAX, "{} data strips", data.len());
        let mut all = [None; DATA_MAX];
        all.iter_mut().zip(data).for_each(|(all, data)| *all = Some(*data));
        self.sums(&all[..data.len()], p, q);
    }

    /// See [`xor_into`].
    pub fn xor_into(&self, delta: &[u8], p: &mut [u8]) {
        self.add(delta, p);
    }

    /// See [`mul_into`].
    pub fn mul_into(&self, index: usize, delta: &[u8], q: &mut [u8]) {
        assert!(index < DATA_MAX, "data strip {index}");
        self.add_product(power(index), delta, q);
    }

    /// See [`recover`](fn@recover).
    ///
    /// # Errors
    /// More is missing than there are parities.
    pub fn recover(&self, shards: &mut [Shard<'_>], parities: usize) -> Result<(), Unrecoverable> {
        recover::recover(self, shards, parities)
    }
}
