//! What the disk under a folder can do.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{Advice, fadvise, statvfs};

/// Whether files in `dir` can be written beside the page cache. Some file systems (tmpfs on older kernels) refuse it.
pub fn takes_direct_io(dir: &Path) -> bool {
    let probe = dir.join(".direct-io");
    let opened = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT).open(&probe);
    // A probe that stays behind does no harm.
    drop(std::fs::remove_file(&probe));
    opened.is_ok()
}

/// With less room a flush or a rebuild can fail; on a small disk a twentieth of it is enough.
const ENOUGH: u64 = 256 << 20;
const ENOUGH_SHARE: u64 = 20;

/// What can still be written under a folder, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    pub free: u64,
    /// With less the disk is nearly full.
    pub enough: u64,
}

impl Room {
    pub fn under(dir: &Path) -> io::Result<Room> {
        let found = statvfs(dir)?;
        let total = found.f_blocks.saturating_mul(found.f_frsize);
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        Ok(Room { free, enough: ENOUGH.min(total / ENOUGH_SHARE) })
    }

    pub fn is_short(self) -> bool {
        self.free < self.enough
    }
}

/// How many bytes can still be written under `dir`.
pub fn room(dir: &Path) -> io::Result<u64> {
    Room::under(dir).map(|room| room.free)
}

/// Makes the next read of a file come from the disk, as far as the system has it in memory and need not write it first.
pub fn drop_from_cache(path: &Path) {
    if let Ok(file) = File::open(path) {
        // It is advice: nothing depends on it.
        fadvise(&file, 0, None, Advice::DontNeed).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_short_of_room_below_what_is_enough_for_it() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let room = Room::under(dir.path()).expect("the disk says it");
        assert!(room.free > 0 && (1..=ENOUGH).contains(&room.enough), "{room:?}");
        assert!(Room { free: room.enough - 1, ..room }.is_short() && !Room { free: room.enough, ..room }.is_short());
    }

    #[test]
    fn a_probe_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        takes_direct_io(dir.path());
        assert_eq!(std::fs::read_dir(dir.path()).expect("the folder is there").count(), 0);
    }
}
