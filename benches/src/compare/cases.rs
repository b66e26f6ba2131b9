//! What is measured, and what is to be reached.
//!
//! Owns: the list. Must not know: how a case is run.

use crate::client::options::Mix;

/// What a disk of ours is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// `null:`
    Null,
    /// `mem:`
    Mem,
    /// `file:` on tmpfs
    File,
    /// `nvme+tcp:` to a `mem:` target in the same process
    NvmeSame,
    /// `nvme+tcp:` to a `mem:` target in a process of its own on the server's core
    NvmeOther,
}

impl Backing {
    /// All of them, in the order of the table.
    pub const ALL: [Backing; 5] =
        [Backing::Null, Backing::Mem, Backing::File, Backing::NvmeSame, Backing::NvmeOther];

    /// The word in a case's name.
    pub fn name(self) -> &'static str {
        match self {
            Backing::Null => "null",
            Backing::Mem => "mem",
            Backing::File => "file",
            Backing::NvmeSame => "nvme-same-process",
            Backing::NvmeOther => "nvme-own-process",
        }
    }

    /// What qemu-storage-daemon is measured on beside it.
    pub fn rival(self) -> Rival {
        if self == Backing::Null { Rival::NullCo } else { Rival::TmpfsFile }
    }
}

/// qemu-storage-daemon's device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rival {
    /// The driver `null-co`.
    NullCo,
    /// A raw file on tmpfs, `cache.direct=on`.
    TmpfsFile,
}

/// A load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Reads or writes, in which order.
    pub mix: Mix,
    /// KiB per request.
    pub kib: u64,
    /// Requests in flight.
    pub depth: u16,
}

impl Shape {
    /// The six loads.
    pub const ALL: [Shape; 6] = [
        Shape { mix: Mix::RandRead, kib: 4, depth: 1 },
        Shape { mix: Mix::RandWrite, kib: 4, depth: 1 },
        Shape { mix: Mix::RandRead, kib: 4, depth: 32 },
        Shape { mix: Mix::RandWrite, kib: 4, depth: 32 },
        Shape { mix: Mix::Read, kib: 128, depth: 8 },
        Shape { mix: Mix::Write, kib: 128, depth: 8 },
    ];

    /// fio's word for the mix.
    pub fn rw(self) -> &'static str {
        match self.mix {
            Mix::Read => "read",
            Mix::Write => "write",
            Mix::RandRead => "randread",
            Mix::RandWrite => "randwrite",
            Mix::Rw => "rw",
            Mix::RandRw => "randrw",
        }
    }
}

/// What a ratio must reach.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Goal {
    /// Our IOPS over the rival's, at least.
    pub iops: Option<f64>,
    /// Our CPU time per request over the rival's, at most.
    pub cpu: Option<f64>,
}

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Case {
    /// Our device.
    pub backing: Backing,
    /// The load.
    pub shape: Shape,
    /// Our `poll_us`.
    pub poll_us: u32,
}

impl Case {
    /// `mem/randread-4k/qd32/poll100`: what `--only` is matched against.
    pub fn name(&self) -> String {
        let Shape { kib, depth, .. } = self.shape;
        format!("{}/{}-{kib}k/qd{depth}/poll{}", self.backing.name(), self.shape.rw(), self.poll_us)
    }

    /// What is to be reached, if this case has a goal.
    pub fn goal(&self) -> Goal {
        let polls = self.poll_us > 0;
        let small = self.shape.kib == 4;
        let (iops, cpu) = match (self.backing, small, self.shape.depth, self.shape.mix) {
            (Backing::Null, true, 32, Mix::RandRead) if polls => (Some(5.0), Some(0.35)),
            (Backing::Null, true, 1, Mix::RandRead) if polls => (Some(2.5), None),
            (Backing::Null, true, 1, Mix::RandRead) => (Some(1.0), Some(1.0)),
            (Backing::Mem, true, 32, _) if polls => (Some(3.0), None),
            (Backing::File, true, 32, _) if polls => (Some(1.2), None),
            (Backing::File, false, 8, _) if polls => (Some(1.1), None),
            (Backing::NvmeSame, true, 32, Mix::RandRead) if polls => (Some(1.1), Some(0.8)),
            (Backing::NvmeSame, true, 32, _) if polls => (Some(1.1), None),
            (Backing::NvmeOther, true, 32, _) if polls => (Some(1.0), None),
            _ => (None, None),
        };
        Goal { iops, cpu }
    }
}

/// All cases: every load on every device with `poll_us` on, and the 4k ones on `null:` and reads at depth 1 and 32 on
/// the others with it off.
pub fn all(poll_us: u32) -> Vec<Case> {
    let mut cases = Vec::new();
    for backing in Backing::ALL {
        for poll_us in [poll_us, 0] {
            for shape in Shape::ALL {
                let small = shape.kib == 4;
                let reads = shape.mix == Mix::RandRead;
                if poll_us > 0 || small && (reads || backing == Backing::Null) {
                    cases.push(Case { backing, shape, poll_us });
                }
            }
        }
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_every_goal_has_a_case() {
        let cases = all(20);
        let mut names: Vec<String> = cases.iter().map(Case::name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), cases.len());
        let goals: Vec<String> =
            cases.iter().filter(|c| c.goal() != Goal::default()).map(Case::name).collect();
        assert_eq!(goals.len(), 3 + 2 + 4 + 2 + 2, "{goals:?}");
        assert!(names.contains(&"null/randread-4k/qd1/poll0".to_owned()));
    }
}
