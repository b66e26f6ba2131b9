//! GF(2^8): the bytes as polynomials over two elements, modulo x^8 + x^4 + x^3 + x^2 + 1 (11Dh), whose generator is 2.
//!
//! Owns: products of single bytes, and the tables by which kernels multiply many. All of it is computed when the
//! program is compiled. A sum is the exclusive or, and so is a difference.

/// What x^8 is, without the x^8.
pub(super) const REDUCED: u8 = 0x1d;

/// `a` · `b`.
pub(super) const fn product(a: u8, b: u8) -> u8 {
    let (mut sum, mut shifted, mut bits) = (0, a, b);
    while bits != 0 {
        if bits & 1 != 0 {
            sum ^= shifted;
        }
        shifted = (shifted << 1) ^ if shifted & 0x80 != 0 { REDUCED } else { 0 };
        bits >>= 1;
    }
    sum
}

/// 2^`exponent`: by what Q weighs the data strip of this index.
pub(super) const fn power(exponent: usize) -> u8 {
    POWERS[exponent]
}

/// 1 / `a`, for any `a` but 0.
pub(super) const fn inverse(a: u8) -> u8 {
    assert!(a != 0, "nothing times 0 is 1");
    INVERSES[a as usize]
}

/// The powers of 2, which repeat after 255.
static POWERS: [u8; 255] = {
    let mut powers = [1; 255];
    let mut exponent = 1;
    while exponent < 255 {
        powers[exponent] = product(powers[exponent - 1], 2);
        exponent += 1;
    }
    powers
};

/// 2^e · 2^(255 - e) is 2^255, which is 1.
static INVERSES: [u8; 256] = {
    let mut inverses = [0; 256];
    let mut exponent = 0;
    while exponent < 255 {
        inverses[POWERS[exponent] as usize] = POWERS[(255 - exponent) % 255];
        exponent += 1;
    }
    inverses
};

/// By factor: its products with 0 to 15, and those with 16 times that. A byte's product is the sum of its two halves'.
#[repr(C, align(32))]
pub(super) struct Halves(pub(super) [[u8; 16]; 2]);

/// [`Halves`] of every factor.
pub(super) static HALVES: [Halves; 256] = {
    let mut tables = [const { Halves([[0; 16]; 2]) }; 256];
    let mut factor = 0;
    while factor < 256 {
        let mut half = 0;
        while half < 16 {
            tables[factor].0[0][half] = product(byte(factor), byte(half));
            tables[factor].0[1][half] = product(byte(factor), byte(half << 4));
            half += 1;
        }
        factor += 1;
    }
    tables
};

/// By factor: multiplication as a matrix of bits, as `gf2p8affineqb` takes it. Byte 7 - i of it selects the bits of a
/// byte whose sum is bit i of the product. (`gf2p8mulb` is for another polynomial.)
pub(super) static MATRICES: [u64; 256] = {
    let mut matrices = [0; 256];
    let mut factor = 0;
    while factor < 256 {
        matrices[factor] = matrix(byte(factor));
        factor += 1;
    }
    matrices
};

/// One of [`MATRICES`].
pub(super) const fn matrix(factor: u8) -> u64 {
    let (mut matrix, mut column) = (0_u64, 0);
    while column < 8 {
        let image = product(factor, 1 << column);
        let mut row = 0;
        while row < 8 {
            if image >> row & 1 != 0 {
                matrix |= 1 << ((7 - row) * 8 + column);
            }
            row += 1;
        }
        column += 1;
    }
    matrix
}

#[allow(clippy::cast_possible_truncation, reason = "indices of tables of 256")]
const fn byte(index: usize) -> u8 {
    assert!(index < 256);
    index as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_goes_through_every_byte_but_zero() {
        let mut seen = [false; 256];
        for exponent in 0..255 {
            let power = power(exponent);
            assert!(power != 0 && !std::mem::replace(&mut seen[usize::from(power)], true), "2^{exponent}");
        }
        assert_eq!((power(8), product(power(254), 2)), (0x1d, 1));
    }

    #[test]
    fn products_agree_with_sums_of_logarithms_and_inverses_undo_them() {
        let mut logarithms = [0; 256];
        (0..255).for_each(|exponent| logarithms[usize::from(power(exponent))] = exponent);
        for a in 0..=255 {
            for b in 0..=255 {
                let expected = if a == 0 || b == 0 {
                    0
                } else {
                    power((logarithms[usize::from(a)] + logarithms[usize::from(b)]) % 255)
                };
                assert_eq!(product(a, b), expected, "{a} · {b}");
            }
            assert!(a == 0 || product(a, inverse(a)) == 1, "1 / {a}");
        }
    }

    #[test]
    fn tables_are_products() {
        for factor in 0..=255 {
            let Halves([low, high]) = &HALVES[usize::from(factor)];
            for byte in 0..=255 {
                let expected = product(factor, byte);
                assert_eq!(low[usize::from(byte & 15)] ^ high[usize::from(byte >> 4)], expected);
                let rows = MATRICES[usize::from(factor)].to_be_bytes();
                let bits = (0..8).map(|bit| u8::from((rows[bit] & byte).count_ones() % 2 == 1) << bit);
                assert_eq!(bits.sum::<u8>(), expected, "{factor} · {byte}");
            }
        }
    }
}
