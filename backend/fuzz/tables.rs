//! What the targets ask of tables, wherever they came from: counts are right, a checkpoint says the same, and all of it can be deleted.

use hawser_volume::format::Root;
use hawser_volume::thin::{Loader, Metadata, Thin, Volume};
use std::collections::BTreeMap;

pub const POOL: [u8; 16] = [9; 16];

/// The metadata area.
pub type Disk = BTreeMap<u32, Vec<u8>>;

pub fn is_line(what: &str) {
    assert!(!what.is_empty() && !what.contains('\n'), "not one line: {what:?}");
}

/// The rest of a checkpoint that was begun; `None`: it was given up, because there are too few pages.
pub fn finish(metadata: &mut Metadata, disk: &mut Disk) -> Option<Root> {
    loop {
        match metadata.checkpoint_step(7) {
            Ok(pages) if pages.is_empty() => break,
            Ok(pages) => disk.extend(pages),
            Err(what) => {
                is_line(&what);
                metadata.end_checkpoint(false);
                return None;
            }
        }
    }
    let root = metadata.checkpoint_root(POOL, 0, 0, 0);
    metadata.end_checkpoint(true);
    Some(root)
}

pub fn load(disk: &Disk, root: &Root, thin: Thin, pages: u32) -> Result<Metadata, String> {
    let mut loader = Loader::new(thin, pages, root);
    loop {
        let wanted = loader.wanted(5);
        if wanted.is_empty() {
            return loader.finish();
        }
        for page in wanted {
            loader.give(page, disk.get(&page).ok_or("a page that was never written")?)?;
        }
    }
}

/// All faults, but one that only a check looks for, because it takes memory for each extent.
fn faults(metadata: &Metadata) -> Vec<String> {
    let mut faults = metadata.verify();
    faults.retain(|fault| !fault.contains("is mapped at index"));
    faults
}

/// Where something is looked for: the beginning, the ends of chunks, the second directory.
fn indices() -> impl Iterator<Item = u32> {
    (0..120).chain((0..12).map(|chunk| chunk * 448 + 440)).chain(512 * 448..512 * 448 + 8)
}

/// Both have the same volumes, and these have the same in them.
fn assert_same(one: &Metadata, other: &Metadata) {
    assert_eq!(one.volumes().count(), other.volumes().count());
    for ((id, volume), (other_id, again)) in one.volumes().zip(other.volumes()) {
        let parts = |id, volume: &Volume| {
            (id, volume.size_bytes(), volume.mapped_extents(), volume.shared_generation())
        };
        assert_eq!(parts(id, volume), parts(other_id, again));
        assert_eq!((volume.name(), volume.uuid()), (again.name(), again.uuid()));
        for index in indices() {
            assert_eq!(one.entry(id, index), other.entry(id, index), "volume {id} at {index}");
        }
    }
}

/// No checkpoint is under way; `disk` has all pages of the last one.
pub fn check(mut metadata: Metadata, mut disk: Disk, pages: u32) {
    metadata.settle();
    assert_eq!(faults(&metadata), Vec::<String>::new());
    metadata.begin_checkpoint(false);
    if let Some(root) = finish(&mut metadata, &mut disk) {
        let again = load(&disk, &root, metadata.thin(), pages).expect("it was written just now");
        assert_eq!(faults(&again), Vec::<String>::new());
        assert_same(&again, &metadata);
        assert_eq!(
            (again.generation(), again.next_volume()),
            (metadata.generation(), metadata.next_volume())
        );
        assert_eq!(
            again.free_extents() + again.reserved_extents(),
            metadata.free_extents() + metadata.reserved_extents()
        );
    }
    let ids: Vec<u32> = metadata.volumes().map(|(id, _)| id).collect();
    for id in ids {
        metadata.apply(&hawser_volume::format::Record::Delete { id }).expect("it is there");
    }
    metadata.settle();
    assert_eq!(metadata.free_extents() + metadata.reserved_extents(), metadata.thin().extents);
    assert_eq!(faults(&metadata), Vec::<String>::new());
}
