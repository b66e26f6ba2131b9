//! Sums over many bytes, by the best instructions that the processor has.
//!
//! Owns: which kernel is used, found out once; the checks of lengths, which make the kernels sound. Must not know: why something
//! is summed.
//!
//! ```text
//!   mod      Kernel: checks, then runs an Operation
//!   ├─ scalar    u64, for every processor; the twin that the others are held against
//!   ├─ vector    the loops, for any vector
//!   └─ x86       the vectors
//! ```
//!
//! All kernels go through the strips side by side, a few vectors of each at a time, and keep the sums in registers: each byte is
//! read once and written once. Q comes by Horner's rule, from the last strip to the first: q = 2·q + d.
//!
//! Invariants: a [`Kernel`] can be had only if the processor has its instructions; what it is given is equally long, and in
//! whole blocks of [`BLOCK_BYTES`].
#![allow(unsafe_code)]

mod scalar;
#[cfg(target_arch = "x86_64")]
mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::fmt;
use std::sync::OnceLock;

/// All lengths are multiples of this.
pub const BLOCK_BYTES: usize = 64;

/// Two results, each as the factors of p and of q.
pub(super) type Matrix = [[u8; 2]; 2];

/// What is to be done with bytes. All slices of one operation are equally long, in whole blocks.
enum Operation<'a> {
    Xor(Xor<'a>),
    Pq(Pq<'a>),
    Solve(Solve<'a>),
    XorInto(XorInto<'a>),
    MultiplyInto(MultiplyInto<'a>),
}

/// p = the sum of the data.
struct Xor<'a> {
    data: &'a [&'a [u8]],
    p: &'a mut [u8],
}

/// p = the sum of the data, q = the sum of 2^i times data i, of which `None` is 0.
struct Pq<'a> {
    data: &'a [Option<&'a [u8]>],
    p: &'a mut [u8],
    q: &'a mut [u8],
}

/// The matrix times these sums, to which the known P and Q are added.
struct Solve<'a> {
    data: &'a [Option<&'a [u8]>],
    p: Option<&'a [u8]>,
    q: Option<&'a [u8]>,
    matrix: &'a Matrix,
    first: &'a mut [u8],
    second: Option<&'a mut [u8]>,
}

/// p += delta.
struct XorInto<'a> {
    delta: &'a [u8],
    p: &'a mut [u8],
}

/// q += factor · delta.
struct MultiplyInto<'a> {
    factor: u8,
    delta: &'a [u8],
    q: &'a mut [u8],
}

/// One way to do it.
pub struct Kernel {
    name: &'static str,
    /// The processor has what it needs.
    has: fn() -> bool,
    /// To be called only if it has, with slices as [`Operation`] wants them.
    run: unsafe fn(Operation<'_>),
}

/// Best first.
#[cfg(target_arch = "x86_64")]
static KERNELS: [&Kernel; 6] =
    [&x86::GFNI, &x86::AVX512, &x86::AVX2, &x86::SSSE3, &x86::SSE2, &scalar::SCALAR];
#[cfg(not(target_arch = "x86_64"))]
static KERNELS: [&Kernel; 1] = [&scalar::SCALAR];

/// All that this processor can run, best first.
pub fn available() -> impl Iterator<Item = &'static Kernel> {
    KERNELS.into_iter().filter(|kernel| (kernel.has)())
}

/// The best of them.
#[must_use]
pub fn chosen() -> &'static Kernel {
    static CHOSEN: OnceLock<&'static Kernel> = OnceLock::new();
    CHOSEN.get_or_init(|| available().next().expect("every processor has the last one"))
}

fn check(expected: usize, len: usize) {
    assert!(len == expected && len.is_multiple_of(BLOCK_BYTES), "{len} bytes beside {expected}");
}

impl Kernel {
    /// What its instructions are called.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    pub(super) fn sum(&self, data: &[&[u8]], p: &mut [u8]) {
        check(p.len(), p.len());
        data.iter().for_each(|data| check(p.len(), data.len()));
        // SAFETY: a kernel is given out only if the processor has its instructions; the lengths were checked.
        unsafe { (self.run)(Operation::Xor(Xor { data, p })) }
    }

    pub(super) fn sums(&self, data: &[Option<&[u8]>], p: &mut [u8], q: &mut [u8]) {
        check(p.len(), q.len());
        data.iter().flatten().for_each(|data| check(p.len(), data.len()));
        // SAFETY: as in `sum`.
        unsafe { (self.run)(Operation::Pq(Pq { data, p, q })) }
    }

    pub(super) fn solve(
        &self,
        data: &[Option<&[u8]>],
        p: Option<&[u8]>,
        q: Option<&[u8]>,
        matrix: &Matrix,
        first: &mut [u8],
        second: Option<&mut [u8]>,
    ) {
        let len = first.len();
        check(len, second.as_ref().map_or(len, |second| second.len()));
        data.iter().flatten().chain(&p).chain(&q).for_each(|known| check(len, known.len()));
        // SAFETY: as in `sum`.
        unsafe { (self.run)(Operation::Solve(Solve { data, p, q, matrix, first, second })) }
    }

    pub(super) fn add(&self, delta: &[u8], p: &mut [u8]) {
        check(p.len(), delta.len());
        // SAFETY: as in `sum`.
        unsafe { (self.run)(Operation::XorInto(XorInto { delta, p })) }
    }

    pub(super) fn add_product(&self, factor: u8, delta: &[u8], q: &mut [u8]) {
        check(q.len(), delta.len());
        // SAFETY: as in `sum`.
        unsafe { (self.run)(Operation::MultiplyInto(MultiplyInto { factor, delta, q })) }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
