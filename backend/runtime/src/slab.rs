//! A vector with holes: values keep their index for as long as they live, and freed indices are used again.

/// Values by small integer keys. Insertion and removal are O(1); nothing moves.
#[derive(Debug)]
pub struct Slab<T> {
    entries: Vec<Entry<T>>,
    free_head: usize,
    len: usize,
}

#[derive(Debug)]
enum Entry<T> {
    Full(T),
    Free { next: usize },
}

const END: usize = usize::MAX;

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { entries: Vec::new(), free_head: END, len: 0 }
    }
}

impl<T> Slab<T> {
    /// An empty slab with room for `capacity` values before it allocates.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Slab { entries: Vec::with_capacity(capacity), free_head: END, len: 0 }
    }

    /// How many values there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts a value into the first free place and returns its key.
    pub fn insert(&mut self, value: T) -> usize {
        self.len += 1;
        if self.free_head == END {
            self.entries.push(Entry::Full(value));
            return self.entries.len() - 1;
        }
        let key = self.free_head;
        let Entry::Free { next } = self.entries[key] else {
            unreachable!("the free list names a full entry")
        };
        self.free_head = next;
        self.entries[key] = Entry::Full(value);
        key
    }

    /// The value at `key`, if there is one.
    #[must_use]
    pub fn get(&self, key: usize) -> Option<&T> {
        match self.entries.get(key) {
            Some(Entry::Full(value)) => Some(value),
            _ => None,
        }
    }

    /// The value at `key`, to change it.
    pub fn get_mut(&mut self, key: usize) -> Option<&mut T> {
        match self.entries.get_mut(key) {
            Some(Entry::Full(value)) => Some(value),
            _ => None,
        }
    }

    /// Takes the value at `key` out.
    pub fn remove(&mut self, key: usize) -> Option<T> {
        let entry = self.entries.get_mut(key)?;
        if matches!(entry, Entry::Free { .. }) {
            return None;
        }
        let Entry::Full(value) = std::mem::replace(entry, Entry::Free { next: self.free_head }) else {
            unreachable!("checked above")
        };
        self.free_head = key;
        self.len -= 1;
        Some(value)
    }

    /// All values with their keys, in key order.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &T)> {
        self.entries.iter().enumerate().filter_map(|(key, entry)| match entry {
            Entry::Full(value) => Some((key, value)),
            Entry::Free { .. } => None,
        })
    }

    /// All values with their keys, to change them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (usize, &mut T)> {
        self.entries.iter_mut().enumerate().filter_map(|(key, entry)| match entry {
            Entry::Full(value) => Some((key, value)),
            Entry::Free { .. } => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Slab;
    use std::collections::BTreeMap;

    #[test]
    fn behaves_like_a_map_with_smallest_effort() {
        let mut slab = Slab::default();
        let mut model = BTreeMap::new();
        let mut seed = 7u64;
        for step in 0..10_000u64 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let key = usize::try_from(seed >> 58).unwrap();
            if seed & (1 << 40) == 0 {
                let key = slab.insert(step);
                assert!(model.insert(key, step).is_none());
            } else {
                assert_eq!(slab.remove(key), model.remove(&key));
            }
            assert_eq!(slab.len(), model.len());
            assert_eq!(slab.get(key), model.get(&key));
        }
        assert!(slab.iter().eq(model.iter().map(|(k, v)| (*k, v))));
    }
}
