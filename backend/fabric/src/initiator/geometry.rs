//! What a namespace is to the layers above, from what its controller says of it.
#![forbid(unsafe_code)]

use crate::nvme::bytes::{low8, low32};
use crate::nvme::identify::{
    DLFEAT_READS_ZEROES, DLFEAT_WRITE_ZEROES_DEALLOCATES, IdentifyController, IdentifyNamespace,
    IdentifyNvmController, NSATTR_WRITE_PROTECTED, NSFEAT_OPTIMAL_PERFORMANCE, NamespaceIds,
    ONCS_DATASET_MANAGEMENT, ONCS_WRITE_ZEROES, VWC_PRESENT,
};
use crate::nvme::properties::Capabilities;
use hawser_block::{BlockSize, DiscardLimits, Geometry, WriteZeroesLimits};

/// The most that one request carries anywhere in hawser.
const TRANSFER_BYTES_MAX: u64 = 4 << 20;
/// NLB is 16 bits, counted from 0.
const COMMAND_BLOCKS_MAX: u64 = 1 << 16;

/// Everything that a controller says of itself and the namespace.
pub(crate) struct Identity {
    pub(crate) capabilities: Capabilities,
    pub(crate) controller: IdentifyController,
    pub(crate) nvm: IdentifyNvmController,
    pub(crate) namespace: IdentifyNamespace,
    pub(crate) ids: NamespaceIds,
}

impl Identity {
    /// The namespace as a block device.
    ///
    /// # Errors
    /// When its format cannot be served, or it has no blocks.
    pub(crate) fn geometry(&self) -> Result<Geometry, String> {
        let Identity { capabilities, controller, nvm, namespace, .. } = self;
        if namespace.size == 0 {
            return Err("the namespace is not active".to_owned());
        }
        let format = namespace.format().map_err(|error| error.to_string())?;
        let block_size = BlockSize::new(1 << format.block_shift).ok_or("the block size cannot be served")?;
        if namespace.size > u64::MAX >> (block_size.shift() + 1) {
            return Err(format!("Identify Namespace: NSZE is {:#x}, too large", namespace.size));
        }
        let block_bytes = u64::from(block_size.bytes());
        let blocks = |count: u64| low32(count.min(u64::from(u32::MAX)));
        // Powers of two of the smallest memory page (base: MDTS, NVM: WZSL); 0 is no limit.
        let page_blocks = |power: u8| {
            let shift = 12 + u32::from(capabilities.page_size_min) + u32::from(power);
            let bytes = 1u64.checked_shl(shift).unwrap_or(u64::MAX);
            if power == 0 { COMMAND_BLOCKS_MAX } else { (bytes / block_bytes).clamp(1, COMMAND_BLOCKS_MAX) }
        };
        let transfer_max = page_blocks(controller.transfer_size_max);
        // Where WZSL is not given, data-less commands keep to MDTS, as with Linux.
        let zeroes_max = match nvm.write_zeroes_size_max {
            0 => transfer_max,
            power => page_blocks(power),
        };
        // Granularities are counted from 0, and given only where NSFEAT says so.
        let optimal = namespace.features & NSFEAT_OPTIMAL_PERFORMANCE != 0;
        let granularity = |zero_based: u16| if optimal { u64::from(zero_based) + 1 } else { 1 };
        let physical = granularity(namespace.write_granularity) * block_bytes;
        let physical = if physical.is_power_of_two() { physical } else { block_bytes };
        let optimal_io = if optimal && namespace.optimal_write_size > 0 {
            granularity(namespace.optimal_write_size) * block_bytes
        } else {
            0
        };
        let no_limit = |limit: u64| if limit == 0 { u64::MAX } else { limit };
        Ok(Geometry {
            block_size,
            blocks: namespace.size,
            physical_block_bytes: blocks(physical),
            optimal_io_bytes: blocks(optimal_io),
            transfer_blocks_max: blocks(transfer_max.min(TRANSFER_BYTES_MAX / block_bytes)),
            read_only: namespace.attributes & NSATTR_WRITE_PROTECTED != 0,
            volatile_cache: controller.volatile_write_cache & VWC_PRESENT != 0,
            discard: (controller.io_commands & ONCS_DATASET_MANAGEMENT != 0).then(|| DiscardLimits {
                blocks_max: blocks(
                    no_limit(u64::from(nvm.dsm_range_blocks_max)).min(no_limit(nvm.dsm_blocks_max)),
                ),
                granularity_blocks: blocks(granularity(namespace.deallocate_granularity)),
                reads_zeroes: namespace.deallocate_features & 7 == DLFEAT_READS_ZEROES,
            }),
            write_zeroes: (controller.io_commands & ONCS_WRITE_ZEROES != 0).then(|| WriteZeroesLimits {
                blocks_max: blocks(zeroes_max),
                may_unmap: namespace.deallocate_features & DLFEAT_WRITE_ZEROES_DEALLOCATES != 0,
            }),
        })
    }

    /// What names the blocks wherever they are reached: UUID, else NGUID, else EUI64; all zero when there is none.
    pub(crate) fn uuid(&self) -> [u8; 16] {
        let NamespaceIds { uuid, nguid, eui64, .. } = self.ids;
        if uuid != [0; 16] {
            return uuid;
        }
        if nguid != [0; 16] {
            return nguid;
        }
        let mut padded = [0; 16];
        padded[..8].copy_from_slice(&eui64);
        padded
    }
}

/// What a device must keep being, however often it is reconnected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) geometry: Geometry,
    /// What layers above call it; stays what it was first.
    pub(crate) uuid: [u8; 16],
    /// All that it has been called.
    pub(crate) ids: NamespaceIds,
}

impl Known {
    /// What `identity` is as a device.
    ///
    /// # Errors
    /// As [`Identity::geometry`].
    pub(crate) fn of(identity: &Identity) -> Result<Known, String> {
        Ok(Known { geometry: identity.geometry()?, uuid: identity.uuid(), ids: identity.ids })
    }

    /// Whether `now` may take the place of what was known.
    ///
    /// # Errors
    /// When it is another device, or has shrunk: one line with both values.
    pub(crate) fn accept(&self, now: &Known) -> Result<(), String> {
        let (then, new) = (&self.geometry, &now.geometry);
        let mut in_common = self.ids.names().is_empty() && now.ids.names().is_empty();
        for (name, old) in self.ids.names() {
            let Some((_, new)) = now.ids.names().into_iter().find(|(other, _)| *other == name) else {
                continue;
            };
            if old != new {
                return Err(format!("the namespace is another: its {name} was {old} and is {new}"));
            }
            in_common = true;
        }
        if !in_common {
            let (old, new) = (self.ids.names(), now.ids.names());
            return Err(format!("the namespace is another: it was {old:?} and is {new:?}"));
        }
        if then.block_size != new.block_size {
            let (old, new) = (then.block_size.bytes(), new.block_size.bytes());
            return Err(format!("the format changed: the block size was {old} and is {new}"));
        }
        if new.blocks < then.blocks {
            let (old, new) = (then.size_bytes(), new.size_bytes());
            return Err(format!("the device shrank: its size was {old} bytes and is {new}"));
        }
        Ok(())
    }

    /// The same on a path that is new, where the smallest of those in use has `others` blocks.
    ///
    /// # Errors
    /// The same, and when it is larger than they are.
    pub(crate) fn accept_among(&self, now: &Known, others: Option<u64>) -> Result<(), String> {
        let accepted = self.accept(now);
        let Some(others) = others else { return accepted };
        let (new, shift) = (now.geometry.blocks, now.geometry.block_size.shift());
        if self.geometry.block_size == now.geometry.block_size && (new > others || new < self.geometry.blocks)
        {
            // That another identifier is the reason is the better thing to say.
            self.accept(&Known { geometry: self.geometry, ..*now })?;
            let (new, others) = (new << shift, others << shift);
            return Err(format!(
                "the namespace is another, or not grown on all paths: its size is {new} bytes here and {others} on the others"
            ));
        }
        accepted
    }

    /// What the device is after `now` was accepted; with several paths only what all of them can do.
    pub(crate) fn merge(&self, now: &Known, several: bool) -> Known {
        let (then, mut geometry) = (&self.geometry, now.geometry);
        // What a cache held of us does not become durable by our using another controller.
        geometry.volatile_cache |= then.volatile_cache;
        if several {
            geometry.transfer_blocks_max = geometry.transfer_blocks_max.min(then.transfer_blocks_max);
            geometry.discard = match (geometry.discard, then.discard) {
                (Some(new), Some(old)) => {
                    let blocks_max = new.blocks_max.min(old.blocks_max);
                    let granularity_blocks = new.granularity_blocks.max(old.granularity_blocks);
                    let reads_zeroes = new.reads_zeroes && old.reads_zeroes;
                    Some(DiscardLimits { blocks_max, granularity_blocks, reads_zeroes })
                }
                _ => None,
            };
            geometry.write_zeroes = match (geometry.write_zeroes, then.write_zeroes) {
                (Some(new), Some(old)) => {
                    let blocks_max = new.blocks_max.min(old.blocks_max);
                    Some(WriteZeroesLimits { blocks_max, may_unmap: new.may_unmap && old.may_unmap })
                }
                _ => None,
            };
        }
        let NamespaceIds { uuid, nguid, eui64, .. } = self.ids;
        let ids = NamespaceIds {
            uuid: if uuid == [0; 16] { now.ids.uuid } else { uuid },
            nguid: if nguid == [0; 16] { now.ids.nguid } else { nguid },
            eui64: if eui64 == [0; 8] { now.ids.eui64 } else { eui64 },
            ..self.ids
        };
        Known { geometry, uuid: self.uuid, ids }
    }
}

impl NamespaceIds {
    /// Those that there are, as people write them.
    fn names(&self) -> Vec<(&'static str, String)> {
        let NamespaceIds { uuid, nguid, eui64, .. } = self;
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let all = [("UUID", uuid_text(uuid)), ("NGUID", hex(nguid)), ("EUI64", hex(eui64))];
        all.into_iter().filter(|(_, text)| text.chars().any(|digit| !matches!(digit, '0' | '-'))).collect()
    }
}

/// A UUID as people write it.
pub(crate) fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::new();
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        for digit in [low8(u32::from(*byte) >> 4), *byte & 15] {
            text.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            capabilities: Capabilities::from_u64(0),
            controller: IdentifyController::default(),
            nvm: IdentifyNvmController::default(),
            namespace: IdentifyNamespace::plain(1000, 12),
            ids: NamespaceIds::default(),
        }
    }

    #[test]
    fn a_plain_namespace_promises_nothing() {
        let geometry = identity().geometry().unwrap();
        assert_eq!(geometry, Geometry::new(BlockSize::B4096, 1000));
    }

    #[test]
    fn what_a_controller_offers_is_offered() {
        let mut identity = identity();
        identity.capabilities.page_size_min = 1;
        identity.controller.transfer_size_max = 4; // 2^4 pages of 8 KiB = 32 blocks
        identity.controller.io_commands = ONCS_DATASET_MANAGEMENT | ONCS_WRITE_ZEROES;
        identity.controller.volatile_write_cache = 1;
        identity.nvm.dsm_range_blocks_max = 77;
        identity.namespace.features = NSFEAT_OPTIMAL_PERFORMANCE;
        identity.namespace.write_granularity = 3;
        identity.namespace.deallocate_granularity = 7;
        identity.namespace.optimal_write_size = 15;
        identity.namespace.deallocate_features = 9;
        identity.namespace.attributes = 1;
        let geometry = identity.geometry().unwrap();
        let discard = DiscardLimits { blocks_max: 77, granularity_blocks: 8, reads_zeroes: true };
        assert_eq!(
            geometry,
            Geometry {
                block_size: BlockSize::B4096,
                blocks: 1000,
                physical_block_bytes: 4 * 4096,
                optimal_io_bytes: 16 * 4096,
                transfer_blocks_max: 32,
                read_only: true,
                volatile_cache: true,
                discard: Some(discard),
                write_zeroes: Some(WriteZeroesLimits { blocks_max: 32, may_unmap: true }),
            }
        );
        identity.nvm.write_zeroes_size_max = 5;
        assert_eq!(identity.geometry().unwrap().write_zeroes.unwrap().blocks_max, 64);
        identity.nvm.write_zeroes_size_max = 255;
        assert_eq!(identity.geometry().unwrap().write_zeroes.unwrap().blocks_max, 65536);
    }

    #[test]
    fn a_namespace_that_cannot_be_served_is_refused() {
        let mut gone = identity();
        gone.namespace.size = 0;
        assert!(gone.geometry().unwrap_err().contains("not active"));
        let mut huge = identity();
        huge.namespace.size = 1 << 60;
        assert!(huge.geometry().unwrap_err().contains("NSZE"));
        let mut metadata = identity();
        metadata.namespace.formats[0].metadata_bytes = 8;
        assert!(metadata.geometry().unwrap_err().contains("LBAF.MS"));
    }

    #[test]
    fn only_growth_is_accepted() {
        let ids = NamespaceIds { uuid: [0xab; 16], ..NamespaceIds::default() };
        let known = Known { geometry: Geometry::new(BlockSize::B512, 100), uuid: [0xab; 16], ids };
        let with = |blocks| Known { geometry: Geometry::new(BlockSize::B512, blocks), ..known };
        assert_eq!(known.accept(&with(100)), Ok(()));
        assert_eq!(known.accept(&with(101)), Ok(()));
        assert_eq!(
            known.accept(&with(99)).unwrap_err(),
            "the device shrank: its size was 51200 bytes and is 50688"
        );
        let other = Known { ids: NamespaceIds::default(), ..known };
        assert!(known.accept(&other).unwrap_err().contains("abababab-abab-abab-abab-abababababab"));
        let format = Known { geometry: Geometry::new(BlockSize::B4096, 100), ..known };
        assert!(known.accept(&format).unwrap_err().contains("was 512 and is 4096"));
    }

    /// Only the best identifier was compared: two namespaces with one UUID, and each an NGUID of its own, were one.
    #[test]
    fn all_identifiers_that_both_have_must_agree() {
        let geometry = Geometry::new(BlockSize::B512, 100);
        let known = |uuid, nguid, eui64| {
            let ids =
                NamespaceIds { uuid: [uuid; 16], nguid: [nguid; 16], eui64: [eui64; 8], command_set: 0 };
            Known { geometry, uuid: [uuid; 16], ids }
        };
        let first = known(1, 2, 3);
        for same in [known(1, 2, 3), known(1, 0, 0), known(0, 2, 0), known(0, 0, 3)] {
            assert_eq!(first.accept(&same), Ok(()));
            assert_eq!(same.accept(&first), Ok(()));
            // What one path says is remembered for those that come later.
            assert_eq!(same.merge(&first, true).ids, first.ids);
            assert_eq!(same.merge(&first, true).uuid, same.uuid);
        }
        for (other, told) in [
            (known(9, 2, 3), "its UUID was 01010101-0101-0101-0101-010101010101 and is 09090909-"),
            (known(1, 9, 3), "its NGUID was 02020202020202020202020202020202 and is 09090909"),
            (known(1, 2, 9), "its EUI64 was 0303030303030303 and is 0909090909090909"),
            (known(0, 0, 0), "it was [(\"UUID\", "),
        ] {
            let why = first.accept(&other).unwrap_err();
            assert!(why.contains(told), "{why}");
        }
        assert!(known(1, 0, 0).accept(&known(0, 2, 3)).is_err(), "none in common");
        assert_eq!(known(0, 0, 0).accept(&known(0, 0, 0)), Ok(()));
    }

    #[test]
    fn the_best_identifier_names_the_blocks() {
        let mut identity = identity();
        identity.ids.eui64 = [1; 8];
        assert_eq!(identity.uuid(), [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        identity.ids.nguid = [2; 16];
        assert_eq!(identity.uuid(), [2; 16]);
        identity.ids.uuid = [3; 16];
        assert_eq!(identity.uuid(), [3; 16]);
    }
}
