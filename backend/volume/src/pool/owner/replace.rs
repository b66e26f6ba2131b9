//! Other members: replacements, spares, more of them.

use super::Owner;
use super::members::write_superblock;
use crate::format::{MemberRecord, Superblock, Uuid};
use crate::pool::PoolError;
use crate::pool::assemble::{new_set, read_only_line, spares_line, still_gets_writes};
use crate::pool::lanes::Leaf;
use crate::pool::shared::View;
use crate::raid::Mode;
use crate::simulated::is_broken;
use hawser_block::{Device, DeviceState, Outcome, Status};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

impl Owner {
    pub(crate) async fn add_member(self: Rc<Self>, device: Arc<dyn Device>) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        self.check_writable().map_err(|status| self.failed("cannot be changed", status))?;
        let leaf = self.leaf_of(device)?;
        let name = leaf.name().to_owned();
        let label = self.label_of(&leaf).await.map_err(|status| self.failed(&name, status))?;
        let label = label.filter(|label| label.pool_uuid == self.shared.uuid).ok_or_else(|| {
            PoolError::Conflict(format!("{name} is no member of pool {}", self.shared.name))
        })?;
        let number = self.members.borrow().iter().position(|member| member.uuid == label.this);
        let spare = self.spares.borrow().iter().position(|(uuid, _)| *uuid == label.this);
        if let Some(spare) = spare {
            self.spares.borrow_mut()[spare].1 = Some(leaf);
            self.publish();
            return Ok(());
        }
        let is_replacement = self.replacing.borrow().as_ref().is_some_and(|it| it.uuid == label.this);
        if is_replacement {
            leaf.device.fail_after(self.options.member_timeout);
            if let Some(it) = self.replacing.borrow_mut().as_mut() {
                it.leaf.get_or_insert(leaf);
            }
            self.publish();
            return Ok(());
        }
        let number = number.and_then(|number| u16::try_from(number).ok()).ok_or_else(|| {
            PoolError::Conflict(format!(
                "{name} was a member of pool {} and has been replaced",
                self.shared.name
            ))
        })?;
        if self.mode_of(number) != Mode::Away {
            return Ok(());
        }
        self.bring_back(number, leaf, Some(&label), true)
            .await
            .map_err(|what| PoolError::Conflict(format!("{name}: {what}")))
    }

    fn leaf_of(&self, device: Arc<dyn Device>) -> Result<Leaf, PoolError> {
        let name = device.name().to_owned();
        let leaf = Leaf::new(device).ok_or_else(|| PoolError::Failed(format!("{name} is not reached")))?;
        if self.view().is_redundant {
            leaf.device.fail_after(self.options.member_timeout);
        }
        Ok(leaf)
    }

    /// A device that belongs to nobody and is large enough.
    /// `place`: whom it replaces, which may be the same device, emptied.
    async fn check_new(
        &self,
        leaf: &Leaf,
        place: Option<u16>,
        data_bytes: u64,
        force: bool,
    ) -> Result<(), PoolError> {
        let name = leaf.name();
        let geometry =
            leaf.device.geometry().ok_or_else(|| PoolError::Failed(format!("{name} is not reached")))?;
        let (block_bytes, needed) = {
            let book = self.book.borrow();
            (book.block_bytes, book.layout.data_offset() + data_bytes)
        };
        if geometry.read_only {
            return Err(PoolError::Wrong(read_only_line(name)));
        }
        if geometry.block_size.bytes() != block_bytes {
            return Err(PoolError::Wrong(format!(
                "{name} has blocks of {} bytes, want {block_bytes} as the pool",
                geometry.block_size.bytes()
            )));
        }
        if geometry.size_bytes() < needed {
            return Err(PoolError::Wrong(format!(
                "{name} has {} bytes, want at least {needed}",
                geometry.size_bytes()
            )));
        }
        // The device of a member that is away may have been emptied, or exchanged behind its name.
        let is_emptied = |number: u16| place == Some(number) && self.mode_of(number) == Mode::Away;
        let is_here = |other: &Option<Leaf>| other.as_ref().is_some_and(|other| other.is_kin(leaf));
        let is_member = (0u16..)
            .zip(self.members.borrow().iter())
            .any(|(number, member)| is_here(&member.leaf) && !is_emptied(number));
        if leaf.device.has_left_behind() {
            return Err(still_gets_writes(name));
        }
        let is_replacement = self.replacing.borrow().as_ref().is_some_and(|it| is_here(&it.leaf));
        let is_ours =
            is_member || is_replacement || self.spares.borrow().iter().any(|(_, spare)| is_here(spare));
        if is_ours {
            return Err(PoolError::Conflict(format!(
                "{name} is a member of pool {} already",
                self.shared.name
            )));
        }
        let label = self.label_of(leaf).await.map_err(|status| self.failed(name, status))?;
        match label {
            Some(label) if !force => Err(PoolError::Conflict(format!(
                "{name} belongs to pool {}, want another device, or --force",
                label.name
            ))),
            _ => Ok(()),
        }
    }

    pub(super) fn random_uuid(&self) -> Uuid {
        let mut uuid = [0; 16];
        uuid[..8].copy_from_slice(&self.runtime.random().to_le_bytes());
        uuid[8..].copy_from_slice(&self.runtime.random().to_le_bytes());
        uuid
    }

    pub(crate) async fn replace(
        self: Rc<Self>,
        old: String,
        device: Arc<dyn Device>,
        force: bool,
    ) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        self.check_writable().map_err(|status| self.failed("cannot be changed", status))?;
        let by_name = self
            .members
            .borrow()
            .iter()
            .position(|member| member.leaf.as_ref().is_some_and(|leaf| leaf.name() == old));
        let number =
            by_name.or_else(|| old.parse().ok()).filter(|number| *number < self.members.borrow().len());
        let number = number.and_then(|number| u16::try_from(number).ok()).ok_or_else(|| {
            PoolError::Unknown(format!(
                "pool {} has no member {old}, want a device or a place",
                self.shared.name
            ))
        })?;
        let leaf = self.leaf_of(device)?;
        let is_copied = self.can_be_copied(number);
        let busy = self.replacing.borrow().as_ref().map(|it| it.member);
        if let Some(other) = busy.filter(|other| is_copied || *other == number) {
            return Err(PoolError::Conflict(format!(
                "pool {} is replacing member {other}, want that ended first, or given up: hawser pool replace {} --abort",
                self.shared.name, self.shared.name
            )));
        }
        if self.is_device_of(number, &leaf) && self.has_left_behind(number) {
            return Err(still_gets_writes(leaf.name()));
        }
        self.check_new(&leaf, Some(number), self.needed_bytes(number), force).await?;
        match is_copied {
            true => self.begin_replacing(number, leaf).await,
            false => self.put_in(number, leaf, self.random_uuid(), 0).await,
        }
    }

    /// Lets a member that was put in say so itself, when nothing of before can undo that. The superblocks' turn is the caller's.
    pub(super) async fn label(self: &Rc<Self>, number: u16) -> Outcome {
        let (uuid, leaf) = {
            let members = self.members.borrow();
            let member = &members[usize::from(number)];
            (member.uuid, member.leaf.clone().ok_or(Status::Path)?)
        };
        self.check_ours()?;
        if leaf.device.has_left_behind() && !is_broken("left_writes_forgotten") {
            return Err(Status::Path);
        }
        let own = Superblock { this: uuid, ..self.book.borrow().clone() };
        write_superblock(self, &leaf, &own).await?;
        self.members.borrow_mut()[usize::from(number)].is_unlabelled = false;
        Ok(())
    }

    /// Puts a device in the place of a member: it has `has_bytes` of its data, in regions that are not marked.
    pub(super) async fn put_in(
        self: &Rc<Self>,
        number: u16,
        leaf: Leaf,
        uuid: Uuid,
        has_bytes: u64,
    ) -> Result<(), PoolError> {
        let (set, index) = self.place_of(number);
        let name = leaf.name().to_owned();
        let is_same = self.is_device_of(number, &leaf);
        if !set.level().is_redundant() {
            return Err(PoolError::Conflict(format!(
                "pool {} has no second copy of what member {number} has",
                self.shared.name
            )));
        }
        // Of the device that it takes the place of nothing matters any more.
        if leaf.device.has_left_behind() || is_same && self.have_tasks_left(number) {
            return Err(still_gets_writes(&name));
        }
        if !self.put_out(number, "is being replaced").await {
            return Err(PoolError::Conflict(format!(
                "member {number} of pool {} is the last with some data",
                self.shared.name
            )));
        }
        let set_index = self.view().array.set_of_member(number).map_or(0, |(set, _)| set);
        // All of it is lacking: that is durable before anybody may take the new one for a member.
        if !is_broken("put_in_unmarked") {
            self.mark_from(set_index, has_bytes).await.map_err(|status| self.failed(&name, status))?;
        }
        {
            let _turn = self.turns.superblock.take().await;
            self.replacing.borrow_mut().take_if(|it| it.member == number);
            {
                let mut members = self.members.borrow_mut();
                let member = &mut members[usize::from(number)];
                (member.uuid, member.leaf, member.is_recorded) = (uuid, Some(leaf.clone()), false);
                member.is_unlabelled = true;
                (member.cache, member.is_doubted) = (Arc::default(), Arc::default());
                self.book.borrow_mut().members[usize::from(number)].data_bytes = set.member_rows_bytes();
            }
            self.record_members().await.map_err(|status| self.failed(&name, status))?;
            self.label(number).await.map_err(|status| self.failed(&name, status))?;
        }
        self.watch(number);
        debug_assert!(set.mode(index) == Mode::Away);
        self.bring_back(number, leaf, None, is_same)
            .await
            .map_err(|what| PoolError::Failed(format!("{name}: {what}")))
    }

    pub(crate) async fn add_spare(
        self: Rc<Self>,
        device: Arc<dyn Device>,
        force: bool,
    ) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        self.check_writable().map_err(|status| self.failed("cannot be changed", status))?;
        if !self.view().is_redundant {
            return Err(PoolError::Conflict(format!(
                "pool {}: {}",
                self.shared.name,
                spares_line(self.view().array.set(0).level())
            )));
        }
        let leaf = self.leaf_of(device)?;
        let data_bytes =
            self.view().array.sets().iter().map(|set| set.member_rows_bytes()).min().unwrap_or(0);
        self.check_new(&leaf, None, data_bytes, force).await?;
        if self.spares.borrow().len() >= crate::format::superblock::SPARES_MAX {
            return Err(PoolError::Conflict(format!("pool {} has enough spares", self.shared.name)));
        }
        let name = leaf.name().to_owned();
        self.spares.borrow_mut().push((self.random_uuid(), Some(leaf)));
        let _turn = self.turns.superblock.take().await;
        self.record_members().await.map_err(|status| self.failed(&name, status))?;
        self.publish();
        Ok(())
    }

    /// A spare takes the place of a member that has been away for long.
    pub(crate) async fn use_spare(self: &Rc<Self>) {
        if self.spares.borrow().is_empty() {
            return;
        }
        let _turn = self.turns.change.take().await;
        if self.is_closing.get() {
            return;
        }
        let now = self.runtime.now();
        let chosen = {
            let (members, spares, book) = (self.members.borrow(), self.spares.borrow(), self.book.borrow());
            let is_away = |number: &u16| {
                let since = members[usize::from(*number)].away_since;
                self.mode_of(*number) == Mode::Away
                    && since.is_some_and(|since| now >= since + self.options.spare_delay)
            };
            let away = (0u16..).take(members.len()).filter(is_away);
            away.filter_map(|number| {
                let needed = book.layout.data_offset() + self.needed_bytes(number);
                let fits = |leaf: &Leaf| {
                    let is_there =
                        leaf.device.state() == DeviceState::Ready && !leaf.device.has_left_behind();
                    is_there && leaf.device.geometry().is_some_and(|it| it.size_bytes() >= needed)
                };
                let spare = spares.iter().position(|(_, leaf)| leaf.as_ref().is_some_and(fits))?;
                Some((number, spare))
            })
            .next()
        };
        let Some((number, spare)) = chosen else { return };
        let (uuid, leaf) = self.spares.borrow_mut().remove(spare);
        let Some(leaf) = leaf else { return };
        log::warn!("pool {}: spare {} takes the place of member {number}", self.shared.name, leaf.name());
        if let Err(what) = self.put_in(number, leaf.clone(), self.random_uuid(), 0).await {
            log::error!("{what}");
            let is_member =
                self.members.borrow()[usize::from(number)].leaf.as_ref().is_some_and(|it| it.same(&leaf));
            if !is_member {
                self.spares.borrow_mut().push((uuid, Some(leaf)));
            }
        }
    }

    pub(crate) async fn grow(
        self: Rc<Self>,
        devices: Vec<Arc<dyn Device>>,
        force: bool,
    ) -> Result<(), PoolError> {
        let _turn = self.turns.change.take().await;
        self.check_writable().map_err(|status| self.failed("cannot be changed", status))?;
        let wanted = usize::from(self.book.borrow().sets[0].members);
        if devices.len() != wanted {
            return Err(PoolError::Wrong(format!(
                "pool {} grows by {wanted} members at a time, and {} are given",
                self.shared.name,
                devices.len()
            )));
        }
        let leaves = devices.into_iter().map(|device| self.leaf_of(device)).collect::<Result<Vec<_>, _>>()?;
        for (index, leaf) in leaves.iter().enumerate() {
            if leaves[..index].iter().any(|other| other.same(leaf)) {
                return Err(PoolError::Wrong(format!("{} is given twice", leaf.name())));
            }
            self.check_new(leaf, None, 1 << 20, force).await?;
        }
        let before = self.book.borrow().clone();
        let data_offset = before.layout.data_offset();
        let records: Vec<MemberRecord> = leaves
            .iter()
            .map(|leaf| {
                let bytes = leaf.device.geometry().map_or(0, |geometry| geometry.size_bytes()) - data_offset;
                MemberRecord { uuid: self.random_uuid(), in_sync: true, data_bytes: bytes }
            })
            .collect();
        let mut book = before.clone();
        // One that is there: the one that it was read from may have been replaced.
        book.this = book.members[0].uuid;
        let first = book.members.len();
        book.members.extend(records);
        let (set, record) = new_set(&book, first, wanted)
            .map_err(|what| PoolError::Wrong(format!("pool {}: {what}", self.shared.name)))?;
        book.sets.push(record);
        book.validate().map_err(|error| PoolError::Wrong(format!("pool {}: {error}", self.shared.name)))?;
        let mut sets = self.view().array.sets().to_vec();
        sets.push(Arc::clone(&set));
        let array = crate::raid::Array::new(sets).map_err(PoolError::Wrong)?;
        for index in 0..set.members() {
            set.set_mode(index, Mode::InSync);
        }
        {
            let _turn = self.turns.superblock.take().await;
            // The new ones first, with a generation that counts for nothing: nobody is told of members that do not know that they are, and
            // nobody believes them before all of them know.
            for leaf in leaves.iter().filter(|_| !is_broken("grown_without_log")) {
                self.begin_parity_log(&set, leaf).await.map_err(|status| self.failed(leaf.name(), status))?;
            }
            let told = leaves.iter().zip(&book.members[first..]);
            for (leaf, record) in told.filter(|_| !is_broken("new_members_told_last")) {
                let own = Superblock { this: record.uuid, generation: 0, ..book.clone() };
                let written = write_superblock(&self, leaf, &own).await;
                written.map_err(|status| self.failed(leaf.name(), status))?;
            }
            let now = self.runtime.now();
            let old_view = self.view();
            for (leaf, record) in leaves.iter().zip(&book.members[first..]) {
                let member = super::Member::new(record.uuid, Some(leaf.clone()), true, now);
                self.members.borrow_mut().push(member);
            }
            let generation = self.book.borrow().generation;
            *self.book.borrow_mut() = Superblock { generation, ..book };
            let all_leaves = self.members.borrow().iter().map(|member| member.leaf.clone()).collect();
            let thin = crate::thin::Thin { extents: array.extents(), ..old_view.thin };
            let table = Arc::clone(&old_view.table);
            self.shared.set_view(View { array, table, thin, leaves: all_leaves, ..*old_view });
            let (_, failed) = self.write_superblocks(&BTreeSet::new()).await;
            if !failed.is_empty() {
                log::warn!(
                    "pool {}: superblocks of members {failed:?} could not be written",
                    self.shared.name
                );
            }
        }
        for number in first..self.members.borrow().len() {
            self.watch(u16::try_from(number).unwrap_or(0));
        }
        self.begin_tail();
        self.use_all_extents().await?;
        self.space.ring();
        Ok(())
    }
}
