//! Intent bits: the regions that may differ between members, because writes to them are or were under way.
//!
//! A page is valid by itself: which is torn or not ours counts as all marked, so that no order among pages is needed.
//!
//! ```text
//!    0       8         12    16     32     36          64
//!    │ magic │ version │ CRC │ pool │ page │ reserved │ 504 words of 64 bits: bit r % 64 of word r / 64 is region r's
//! ```

use super::bytes::{
    fill_page, is_sealed, put_header, put_u32, put_u64, seal, take, take_header, take_reserved, take_u32,
};
use super::{FormatError, PAGE_BYTES, Uuid};

const MAGIC: &[u8; 8] = b"HAWSERIN";
const HEADER_BYTES: usize = 64;
/// Words in a page.
const WORDS: usize = (PAGE_BYTES - HEADER_BYTES) / 8;

/// Regions that one page has bits for.
pub const INTENTS_PER_PAGE: u32 = 4032 * 8;
const _: () = assert!(WORDS == 504 && INTENTS_PER_PAGE as usize == WORDS * 64);

/// The `page`-th page; `words` are 504.
#[must_use]
pub fn encode_intents(pool: &Uuid, page: u32, words: &[u64]) -> Vec<u8> {
    assert_eq!(words.len(), WORDS, "words of a page of intents");
    let mut out = Vec::with_capacity(PAGE_BYTES);
    put_header(&mut out, MAGIC);
    out.extend_from_slice(pool);
    put_u32(&mut out, page);
    out.resize(HEADER_BYTES, 0);
    words.iter().for_each(|&word| put_u64(&mut out, word));
    fill_page(&mut out);
    seal(&mut out);
    out
}

/// The 504 words of the `page`-th page. `None`: torn or not ours, so that all its regions count as marked.
#[must_use]
pub fn decode_intents(bytes: &[u8], pool: &Uuid, page: u32) -> Option<Vec<u64>> {
    if bytes.len() != PAGE_BYTES || !is_sealed(bytes) {
        return None;
    }
    parse(bytes, pool, page).ok().flatten()
}

fn parse(mut bytes: &[u8], pool: &Uuid, page: u32) -> Result<Option<Vec<u64>>, FormatError> {
    take_header(&mut bytes, MAGIC)?;
    if take::<16>(&mut bytes)? != *pool || take_u32(&mut bytes)? != page {
        return Ok(None);
    }
    take_reserved(&mut bytes, HEADER_BYTES - 36)?;
    let (words, _) = bytes.as_chunks::<8>();
    Ok(Some(words.iter().map(|&word| u64::from_le_bytes(word)).collect()))
}
