//! A namespace's UUID where nobody gave one: version 5 (RFC 9562, 5.5), the same for the same NQN and NSID for ever.

/// The name space of our names, made at random once.
const NAME_SPACE: [u8; 16] = *b"\x6d\x0b\x9a\x52\x4c\x1e\x47\xf3\x9d\x28\xe1\x75\x30\xc6\x8f\x1b";

/// The UUID of namespace `nsid` of subsystem `nqn`.
pub(super) fn of_namespace(nqn: &str, nsid: u32) -> [u8; 16] {
    let mut name = NAME_SPACE.to_vec();
    name.extend_from_slice(nqn.as_bytes());
    name.push(0);
    name.extend_from_slice(&nsid.to_be_bytes());
    let hash = sha1(&name);
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&hash[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x50;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// One identity for the caches of several namespaces; `None` when one of them has none.
pub(super) fn of_caches(caches: impl Iterator<Item = (u32, Option<[u8; 16]>)>) -> Option<[u8; 16]> {
    let mut all = NAME_SPACE.to_vec();
    for (nsid, cache) in caches {
        all.extend_from_slice(&nsid.to_be_bytes());
        all.extend_from_slice(&cache?);
    }
    let mut identity = [0; 16];
    identity.copy_from_slice(&sha1(&all)[..16]);
    Some(identity)
}

/// SHA-1 (FIPS 180-4, 6.1): for names, not for security.
fn sha1(message: &[u8]) -> [u8; 20] {
    let mut padded = message.to_vec();
    padded.push(0x80);
    while padded.len() % 64 != 56 {
        padded.push(0);
    }
    padded.extend_from_slice(&(message.len() as u64 * 8).to_be_bytes());
    let mut state: [u32; 5] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];
    for block in padded.chunks_exact(64) {
        let mut words = [0u32; 80];
        for (word, bytes) in words.iter_mut().zip(block.chunks_exact(4)) {
            *word = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        for t in 16..80 {
            words[t] = (words[t - 3] ^ words[t - 8] ^ words[t - 14] ^ words[t - 16]).rotate_left(1);
        }
        let [mut a, mut b, mut c, mut d, mut e] = state;
        for (t, word) in words.iter().enumerate() {
            let (f, k) = match t {
                0..20 => (b & c | !b & d, 0x5a82_7999),
                20..40 => (b ^ c ^ d, 0x6ed9_eba1),
                40..60 => (b & c | b & d | c & d, 0x8f1b_bcdc),
                _ => (b ^ c ^ d, 0xca62_c1d6u32),
            };
            let next = a.rotate_left(5).wrapping_add(f).wrapping_add(e).wrapping_add(k).wrapping_add(*word);
            (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
        }
        for (sum, value) in state.iter_mut().zip([a, b, c, d, e]) {
            *sum = sum.wrapping_add(value);
        }
    }
    let mut hash = [0; 20];
    for (bytes, word) in hash.chunks_exact_mut(4).zip(state) {
        bytes.copy_from_slice(&word.to_be_bytes());
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn sha1_gives_the_published_examples() {
        assert_eq!(hex(&sha1(b"abc")), "a9993e364706816aba3e25717850c26c9cd0d89d");
        let long = b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
        assert_eq!(hex(&sha1(long)), "84983e441c3bd26ebaae4aa1f95129e5e54670f1");
        assert_eq!(hex(&sha1(&[b'a'; 1000])), "291e9a6c66994949b57ba5e650361e98fc36b1ba");
    }

    #[test]
    fn a_namespace_keeps_its_uuid_and_shares_it_with_nobody() {
        let uuid = of_namespace("nqn.a", 1);
        assert_eq!(uuid, of_namespace("nqn.a", 1));
        assert_ne!(uuid, of_namespace("nqn.a", 2));
        assert_ne!(uuid, of_namespace("nqn.b", 1));
        assert_eq!((uuid[6] >> 4, uuid[8] >> 6), (5, 2));
    }
}
