//! Files that a power cut leaves old or new, never half, and folders that are still there after it.
//!
//! Owns: the order of operations. Must not know: what the files say. What is asked of the file system goes through
//! [`Files`], so that a model can cut the power between any two operations.
//!
//! ```text
//! replace:  write .new-NAME │ fsync it │ rename over NAME │ fsync the folder
//!           old             │ old      │ old or new       │ new
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A file system.
pub(crate) trait Files {
    /// Makes or overwrites a file.
    fn write(&self, file: &Path, content: &[u8], mode: u32) -> io::Result<()>;
    /// Makes a file's content, or a folder's names, survive a power cut.
    fn sync(&self, path: &Path) -> io::Result<()>;
    /// Gives a file another name in its folder, in place of what has that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, file: &Path) -> io::Result<()>;
    /// Makes a folder in one that is there; one that is there already is an error.
    fn make_folder(&self, folder: &Path, mode: u32) -> io::Result<()>;
}

/// The machine's.
pub(crate) struct Machine;

impl Files for Machine {
    fn write(&self, file: &Path, content: &[u8], mode: u32) -> io::Result<()> {
        let mut new = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(file)?;
        // A file that was there has its own mode, and a new one what the umask left.
        new.set_permissions(fs::Permissions::from_mode(mode))?;
        new.write_all(content)
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        // fsync is about the file, not the descriptor: it covers what was written through any.
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, file: &Path) -> io::Result<()> {
        fs::remove_file(file)
    }

    fn make_folder(&self, folder: &Path, mode: u32) -> io::Result<()> {
        DirBuilder::new().mode(mode).create(folder)
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Where a file's next content is written first. There is one writer, so one name is enough, and nothing piles up.
fn new_name(file: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".new-");
    name.push(file.file_name().unwrap_or_default());
    file.with_file_name(name)
}

/// Puts `content` in the place of `file`: whoever reads it, also after a power cut, sees the old or the new whole; once this
/// has returned, the new. For one writer at a time.
///
/// # Errors
/// As the operations; the old content stands then, or the new one that a power cut may undo.
pub(crate) fn replace(files: &impl Files, file: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let new = new_name(file);
    let written = files
        .write(&new, content, mode)
        .and_then(|()| files.sync(&new))
        .and_then(|()| files.rename(&new, file));
    if let Err(error) = written {
        // It may not have come to be; the next one overwrites it anyway.
        let _ = files.remove(&new);
        return Err(error);
    }
    files.sync(folder_of(file))
}

/// Removes `file` for good.
///
/// # Errors
/// As the operations.
pub(crate) fn remove(files: &impl Files, file: &Path) -> io::Result<()> {
    files.remove(file)?;
    files.sync(folder_of(file))
}

/// Makes `folder`, and those above it, unless they are there.
///
/// # Errors
/// As the operations.
pub(crate) fn make_folder(files: &impl Files, folder: &Path, mode: u32) -> io::Result<()> {
    match files.make_folder(folder, mode) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && folder.parent().is_some() => {
            make_folder(files, folder_of(folder), mode)?;
            files.make_folder(folder, mode)?;
        }
        other => other?,
    }
    files.sync(folder_of(folder))
}

#[cfg(test)]
pub(crate) mod model {
    //! A file system that loses everything that POSIX lets it lose.

    use super::Files;
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeMap;
    use std::io;
    use std::path::{Path, PathBuf};

    /// `None`: a folder.
    type Content = Option<Vec<u8>>;

    #[derive(Clone, Default)]
    struct State {
        /// Every file and folder that ever was: what it holds now, and whether that would survive.
        nodes: Vec<(Content, bool)>,
        /// What a running program sees.
        now: BTreeMap<PathBuf, usize>,
        /// What certainly survives.
        durable: BTreeMap<PathBuf, usize>,
        /// Changes of names since, each whole or not at all, in any selection: `None` removes.
        pending: Vec<Vec<(PathBuf, Option<usize>)>>,
        operations: usize,
    }

    /// The model.
    #[derive(Default)]
    pub(crate) struct Model {
        state: RefCell<State>,
        /// The power goes before this operation.
        cut: Option<usize>,
        cut_happened: Cell<bool>,
        /// This operation does nothing, and says that it did.
        skipped: Option<usize>,
    }

    /// What may be found after a power cut: file and content.
    pub(crate) type Image = BTreeMap<PathBuf, Vec<u8>>;

    impl Model {
        /// With folders and files that are there and durable.
        pub(crate) fn with(folders: &[&str], files: &[(&str, &str)]) -> Model {
            let model = Model::default();
            let mut state = model.state.borrow_mut();
            let all = folders.iter().map(|path| (path, None));
            for (path, content) in all.chain(files.iter().map(|(path, text)| (path, Some(text)))) {
                let node = state.nodes.len();
                state.nodes.push((content.map(|text| text.as_bytes().to_vec()), true));
                state.now.insert(PathBuf::from(path), node);
            }
            state.durable = state.now.clone();
            drop(state);
            model
        }

        fn copy(&self, cut: Option<usize>, skipped: Option<usize>) -> Model {
            Model { state: self.state.clone(), cut, cut_happened: Cell::new(false), skipped }
        }

        /// Runs `what` with the power cut before each operation and after the last, and holds everything that may then be
        /// found against `right`, which is told whether `what` had returned. `skip` leaves one operation out.
        pub(crate) fn cut_everywhere(
            &self,
            skip: Option<usize>,
            what: impl Fn(&Model) -> io::Result<()>,
            right: impl Fn(&Image, bool) -> bool,
        ) -> Result<usize, String> {
            for cut in 0.. {
                let model = self.copy(Some(cut), skip);
                let done = what(&model).is_ok();
                for image in model.images() {
                    if !right(&image, done) {
                        return Err(format!("power cut before operation {cut}: {image:?}"));
                    }
                }
                if !model.cut_happened.get() {
                    return Ok(cut);
                }
            }
            unreachable!("it ends with the last operation")
        }

        /// Everything that may be found if the power goes now.
        fn images(&self) -> Vec<Image> {
            let state = self.state.borrow();
            let mut images = Vec::new();
            for selection in 0..1u32 << state.pending.len() {
                let mut names = state.durable.clone();
                for (at, changes) in state.pending.iter().enumerate() {
                    if selection & 1 << at == 0 {
                        continue;
                    }
                    for (path, node) in changes {
                        match node {
                            Some(node) => names.insert(path.clone(), *node),
                            None => names.remove(path),
                        };
                    }
                }
                // Content that was not synced: nothing, a part, zeroes of the right length, or all of it.
                for torn in 0..4 {
                    let content = |node: usize| {
                        let (content, synced) = &state.nodes[node];
                        let content = content.as_ref()?;
                        Some(match torn {
                            _ if *synced => content.clone(),
                            0 => Vec::new(),
                            1 => content[..content.len() / 2].to_vec(),
                            2 => vec![0; content.len()],
                            _ => content.clone(),
                        })
                    };
                    let reachable = |path: &Path| {
                        path.ancestors()
                            .skip(1)
                            .all(|above| above == Path::new("/") || names.contains_key(above))
                    };
                    images.push(
                        names
                            .iter()
                            .filter(|(path, _)| reachable(path))
                            .filter_map(|(path, node)| Some((path.clone(), content(*node)?)))
                            .collect(),
                    );
                }
            }
            images
        }

        /// One more operation; `false`: it is the one that is left out.
        fn begin(&self) -> io::Result<bool> {
            let operation = self.state.borrow().operations;
            if self.cut == Some(operation) {
                self.cut_happened.set(true);
                return Err(io::Error::other("the power is gone"));
            }
            self.state.borrow_mut().operations += 1;
            Ok(self.skipped != Some(operation))
        }

        fn change(&self, changes: Vec<(PathBuf, Option<usize>)>) {
            let mut state = self.state.borrow_mut();
            for (path, node) in &changes {
                match node {
                    Some(node) => state.now.insert(path.clone(), *node),
                    None => state.now.remove(path),
                };
            }
            state.pending.push(changes);
        }

        fn add(&self, path: &Path, content: Content) -> io::Result<()> {
            if path.parent().is_some_and(|above| above != Path::new("/") && self.node(above).is_err()) {
                return Err(io::ErrorKind::NotFound.into());
            }
            let node = self.state.borrow().nodes.len();
            // An empty folder has nothing to lose.
            let synced = content.is_none();
            self.state.borrow_mut().nodes.push((content, synced));
            self.change(vec![(path.to_owned(), Some(node))]);
            Ok(())
        }

        fn node(&self, path: &Path) -> io::Result<usize> {
            self.state.borrow().now.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
        }
    }

    impl Files for Model {
        fn write(&self, file: &Path, content: &[u8], _: u32) -> io::Result<()> {
            if !self.begin()? {
                return Ok(());
            }
            match self.node(file) {
                Ok(node) => {
                    self.state.borrow_mut().nodes[node] = (Some(content.to_vec()), false);
                    Ok(())
                }
                Err(_) => self.add(file, Some(content.to_vec())),
            }
        }

        fn sync(&self, path: &Path) -> io::Result<()> {
            if !self.begin()? {
                return Ok(());
            }
            let node = (path != Path::new("/")).then(|| self.node(path)).transpose()?;
            let mut state = self.state.borrow_mut();
            if let Some(node) = node {
                state.nodes[node].1 = true;
            }
            let pending = std::mem::take(&mut state.pending);
            for changes in pending {
                if changes[0].0.parent() != Some(path) {
                    state.pending.push(changes);
                    continue;
                }
                for (path, node) in changes {
                    match node {
                        Some(node) => state.durable.insert(path, node),
                        None => state.durable.remove(&path),
                    };
                }
            }
            Ok(())
        }

        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            if self.begin()? {
                let node = self.node(from)?;
                self.change(vec![(to.to_owned(), Some(node)), (from.to_owned(), None)]);
            }
            Ok(())
        }

        fn remove(&self, file: &Path) -> io::Result<()> {
            if self.begin()? {
                self.node(file)?;
                self.change(vec![(file.to_owned(), None)]);
            }
            Ok(())
        }

        fn make_folder(&self, folder: &Path, _: u32) -> io::Result<()> {
            if !self.begin()? {
                return Ok(());
            }
            match self.node(folder) {
                Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
                Err(_) => self.add(folder, None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::model::{Image, Model};
    use super::*;

    const FILE: &str = "/run/state.json";

    fn old_or_new(image: &Image, done: bool) -> bool {
        let content = image.get(Path::new(FILE)).map(Vec::as_slice);
        content == Some(b"the new one") || (!done && content == Some(b"old"))
    }

    #[test]
    fn a_power_cut_anywhere_leaves_the_old_content_or_the_new() {
        let model = Model::with(&["/run"], &[(FILE, "old")]);
        let replace = |files: &Model| replace(files, Path::new(FILE), b"the new one", 0o600);
        let operations = model.cut_everywhere(None, replace, old_or_new).unwrap();
        assert_eq!(operations, 4);
        // What a power cut left of the one before is in nobody's way.
        let model = Model::with(&["/run"], &[(FILE, "old"), ("/run/.new-state.json", "half of someth")]);
        model.cut_everywhere(None, replace, old_or_new).unwrap();
    }

    /// That the model finds what is wrong: without either of the two syncs something half, or nothing, may be found.
    #[test]
    fn each_sync_is_needed() {
        let model = Model::with(&["/run"], &[(FILE, "old")]);
        let replace = |files: &Model| replace(files, Path::new(FILE), b"the new one", 0o600);
        for sync in [1, 3] {
            let error = model.cut_everywhere(Some(sync), replace, old_or_new).unwrap_err();
            assert!(error.starts_with("power cut before operation"), "{error}");
        }
        let rename_first = |files: &Model| {
            files.write(Path::new("/run/n"), b"the new one", 0)?;
            files.rename(Path::new("/run/n"), Path::new(FILE))?;
            files.sync(Path::new(FILE))?;
            files.sync(Path::new("/run"))
        };
        model.cut_everywhere(None, rename_first, old_or_new).unwrap_err();
    }

    #[test]
    fn folders_and_what_was_removed_survive_too() {
        let model = Model::with(&["/etc"], &[("/etc/f", "text")]);
        let file = Path::new("/etc/a/b/f");
        let make = |files: &Model| {
            make_folder(files, Path::new("/etc/a/b"), 0o755)?;
            replace(files, file, b"new", 0o644)
        };
        let right = |image: &Image, done: bool| {
            image.get(file).map_or(!done, |content| content == b"new")
                && image.contains_key(Path::new("/etc/f"))
        };
        let operations = model.cut_everywhere(None, make, right).unwrap();
        let needed = (0..operations).filter(|skip| model.cut_everywhere(Some(*skip), make, right).is_err());
        assert!(needed.count() >= 4, "two folders, the file and its name");
        let gone = |files: &Model| remove(files, Path::new("/etc/f"));
        let right = |image: &Image, done: bool| !(done && image.contains_key(Path::new("/etc/f")));
        model.cut_everywhere(None, gone, right).unwrap();
        model.cut_everywhere(Some(1), gone, right).unwrap_err();
    }

    #[test]
    fn the_machine_does_the_same_and_leaves_nothing_else_behind() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("a/b");
        make_folder(&Machine, &inner, 0o700).unwrap();
        make_folder(&Machine, &inner, 0o700).unwrap();
        let file = inner.join("f");
        for content in ["first and long", "second"] {
            replace(&Machine, &file, content.as_bytes(), 0o640).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), content);
        }
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(&inner).unwrap().count(), 1);
        // A folder cannot be replaced by a file: what was written for it goes away again.
        replace(&Machine, &inner, b"x", 0o600).unwrap_err();
        assert_eq!(fs::read_dir(inner.parent().unwrap()).unwrap().count(), 1);
        remove(&Machine, &file).unwrap();
        assert!(!file.exists());
    }
}
