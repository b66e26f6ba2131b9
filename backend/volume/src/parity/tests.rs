//! Every kernel beside sums that are made byte by byte, as the definition has them; everything that can be lost, recovered.

use super::{BLOCK_BYTES, DATA_MAX, Kernel, Shard, Unrecoverable, available, chosen};
use crate::raid::tests::Random;

/// Of one vector alone, of the loop over several, and of both with any kernel.
const LENGTHS: [usize; 5] = [0, BLOCK_BYTES, BLOCK_BYTES * 4, BLOCK_BYTES * 7, 4096 + BLOCK_BYTES];

/// Polynomials multiplied in full, and divided by 11Dh.
fn times(a: u8, b: u8) -> u8 {
    let mut product = (0..8).filter(|bit| b >> bit & 1 != 0).fold(0, |sum, bit| sum ^ u16::from(a) << bit);
    for bit in (8..16).rev() {
        if product >> bit & 1 != 0 {
            product ^= 0x11d << (bit - 8);
        }
    }
    u8::try_from(product).expect("divided")
}

fn weight(index: usize) -> u8 {
    (0..index).fold(1, |power, _| times(power, 2))
}

fn random(random: &mut Random, len: usize) -> Vec<u8> {
    (0..len).map(|_| random.next().to_le_bytes()[3]).collect()
}

/// The data strips of a stripe, P and Q.
fn stripe(from: &mut Random, data: usize, len: usize) -> Vec<Vec<u8>> {
    let mut strips: Vec<_> = (0..data).map(|_| random(from, len)).collect();
    let p = (0..len).map(|at| strips.iter().fold(0, |sum, strip| sum ^ strip[at])).collect();
    let weights: Vec<u8> = (0..data).map(weight).collect();
    let q = (0..len)
        .map(|at| strips.iter().zip(&weights).fold(0, |sum, (strip, weight)| sum ^ times(strip[at], *weight)))
        .collect();
    strips.extend([p, q]);
    strips
}

fn slices(strips: &[Vec<u8>]) -> Vec<&[u8]> {
    strips.iter().map(Vec::as_slice).collect()
}

#[test]
fn weights_are_those_of_linux() {
    // From "The mathematics of RAID-6": 2^8 and what follows.
    assert_eq!([8, 9, 10, 11, 12].map(weight), [0x1d, 0x3a, 0x74, 0xe8, 0xcd]);
}

#[test]
fn the_scalar_kernel_is_always_there_and_the_best_one_is_chosen() {
    let names: Vec<_> = available().map(Kernel::name).collect();
    assert_eq!(names.last(), Some(&"scalar"));
    assert_eq!(names.first(), Some(&chosen().name()));
    #[cfg(target_arch = "x86_64")]
    assert!(names.contains(&"SSE2"), "{names:?}: all of them have it");
}

#[test]
fn parities_agree_with_their_definition() {
    let mut from = Random(1);
    for kernel in available() {
        for data in (0..=9).chain([16, DATA_MAX - 1, DATA_MAX]) {
            for len in LENGTHS {
                let strips = stripe(&mut from, data, len);
                let known = slices(&strips[..data]);
                let (mut p, mut q) = (vec![1; len], vec![2; len]);
                kernel.pq(&known, &mut p, &mut q);
                assert_eq!((&p, &q), (&strips[data], &strips[data + 1]), "{kernel:?} {data} {len}");
                p.fill(3);
                kernel.xor(&known, &mut p);
                assert_eq!(p, strips[data], "{kernel:?} {data} {len}");
            }
        }
    }
}

#[test]
fn slices_at_any_address_give_the_same() {
    let mut from = Random(2);
    let strips = stripe(&mut from, 3, BLOCK_BYTES * 5);
    for kernel in available() {
        for shift in [1, 8, 31, 63] {
            let moved: Vec<Vec<u8>> =
                strips.iter().map(|strip| [&vec![0; shift], strip.as_slice()].concat()).collect();
            let known: Vec<&[u8]> = moved[..3].iter().map(|strip| &strip[shift..]).collect();
            let (mut p, mut q) = (vec![7; shift + BLOCK_BYTES * 5 + 1], vec![7; shift + BLOCK_BYTES * 5 + 1]);
            let end = p.len() - 1;
            kernel.pq(&known, &mut p[shift..end], &mut q[shift..end]);
            assert_eq!((&p[shift..end], &q[shift..end]), (&*strips[3], &*strips[4]), "{kernel:?} {shift}");
            for parity in [p, q] {
                assert!(parity[..shift].iter().chain(&parity[end..]).all(|byte| *byte == 7), "beside it");
            }
        }
    }
}

#[test]
fn changes_of_one_strip_bring_both_parities_up_to_date() {
    let mut from = Random(3);
    for kernel in available() {
        for len in LENGTHS {
            for index in 0..DATA_MAX {
                let old = stripe(&mut from, index + 1, len);
                let new = random(&mut from, len);
                let mut changed = old.clone();
                changed[index].clone_from(&new);
                let (mut p, mut q, mut delta) = (vec![0; len], vec![0; len], vec![0; len]);
                kernel.pq(&slices(&changed[..=index]), &mut p, &mut q);
                kernel.xor(&[&old[index], &new], &mut delta);
                let [mut p_updated, mut q_updated] = [old[index + 1].clone(), old[index + 2].clone()];
                kernel.xor_into(&delta, &mut p_updated);
                kernel.mul_into(index, &delta, &mut q_updated);
                assert_eq!((p_updated, q_updated), (p, q), "{kernel:?} {index} {len}");
            }
        }
    }
}

/// Recovers what is `missing`, of it only what is `wanted`; the rest of the buffers must stay as they were.
fn recovered(
    kernel: &Kernel,
    strips: &[Vec<u8>],
    parities: usize,
    missing: &[usize],
    wanted: &[usize],
) -> Result<(), Unrecoverable> {
    let mut outs: Vec<Vec<u8>> = strips.iter().map(|strip| vec![0x5a; strip.len()]).collect();
    let mut shards: Vec<Shard<'_>> = outs
        .iter_mut()
        .enumerate()
        .map(|(index, out)| match (missing.contains(&index), wanted.contains(&index)) {
            (false, _) => Shard::Known(&strips[index]),
            (true, true) => Shard::Wanted(out),
            (true, false) => Shard::Lost,
        })
        .collect();
    let result = kernel.recover(&mut shards, parities);
    for (index, out) in outs.iter().enumerate() {
        if result.is_ok() && wanted.contains(&index) {
            assert!(*out == strips[index], "{kernel:?} {} {missing:?} {wanted:?}: {index}", strips.len());
        } else {
            assert!(out.iter().all(|byte| *byte == 0x5a), "{kernel:?} {missing:?} {wanted:?}: {index}");
        }
    }
    result
}

#[test]
fn any_two_of_data_p_and_q_are_recovered_and_any_one_of_them() {
    let mut from = Random(4);
    for kernel in available() {
        for data in (1..=8).chain([15, DATA_MAX - 1]) {
            for len in [BLOCK_BYTES, BLOCK_BYTES * 5] {
                let strips = stripe(&mut from, data, len);
                for x in 0..strips.len() {
                    assert_eq!(recovered(kernel, &strips, 2, &[x], &[x]), Ok(()));
                    for y in x + 1..strips.len() {
                        for wanted in [&[x, y][..], &[x], &[y], &[]] {
                            assert_eq!(recovered(kernel, &strips, 2, &[x, y], wanted), Ok(()));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn any_one_of_data_and_p_is_recovered_without_q() {
    let mut from = Random(5);
    for kernel in available() {
        for data in (1..=8).chain([15, DATA_MAX]) {
            let mut strips = stripe(&mut from, data, BLOCK_BYTES * 5);
            strips.pop();
            assert_eq!(recovered(kernel, &strips, 1, &[], &[]), Ok(()));
            for x in 0..strips.len() {
                assert_eq!(recovered(kernel, &strips, 1, &[x], &[x]), Ok(()));
            }
        }
    }
}

#[test]
fn what_no_parity_can_say_is_refused_and_nothing_is_written() {
    let mut from = Random(6);
    let strips = stripe(&mut from, 4, BLOCK_BYTES);
    let count = strips.len();
    for x in 0..count {
        for y in x + 1..count {
            for z in y + 1..count {
                let missing = [x, y, z];
                assert_eq!(
                    recovered(chosen(), &strips, 2, &missing, &missing),
                    Err(Unrecoverable),
                    "{missing:?}"
                );
            }
        }
    }
    for x in 0..count - 1 {
        for y in x + 1..count - 1 {
            let refused = recovered(chosen(), &strips[..count - 1], 1, &[x, y], &[x, y]);
            assert_eq!(refused, Err(Unrecoverable), "{x} {y}");
        }
    }
}

#[test]
#[should_panic(expected = "64 bytes beside 128")]
fn strips_of_unlike_length_are_our_bug() {
    super::xor(&[&[0; 128], &[0; 64]], &mut [0; 128]);
}

#[test]
#[should_panic(expected = "100 bytes beside 100")]
fn strips_of_no_whole_blocks_are_our_bug() {
    super::mul_into(1, &[0; 100], &mut [0; 100]);
}
