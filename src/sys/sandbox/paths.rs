//! Files and TCP ports that a thread may still reach (landlock(7)); where the kernel has no landlock,
//! or an older one, as much of it as there is.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, NetPort, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};

/// The newest landlock whose rules are used.
const NEWEST: ABI = ABI::V7;

/// What may be done with a file, or with all files beneath a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Read.
    Read,
    /// Read, list, make, write, replace and remove files and sockets in a directory.
    Change,
}

/// What is within reach. Connecting to a Unix socket is not restricted, nor is what is open already.
#[derive(Clone, Debug, Default)]
pub struct Allowed {
    /// Paths; one that does not exist is left out.
    pub paths: Vec<(PathBuf, Reach)>,
    /// TCP ports that may be listened on.
    pub listen: Vec<u16>,
    /// TCP ports that may be connected to.
    pub connect: Vec<u16>,
}

impl Allowed {
    /// The directory that `path` is in, where files are made, replaced and removed.
    pub fn change_beside(&mut self, path: &Path) {
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        self.paths.push((parent.to_owned(), Reach::Change));
    }

    /// Adds files that may be read.
    pub fn read<'a>(&mut self, paths: impl IntoIterator<Item = &'a str>) {
        self.paths.extend(paths.into_iter().map(|p| (p.into(), Reach::Read)));
    }
}

/// Puts everything else out of this thread's reach, and out of that of threads that it starts. Says
/// how much of that the kernel enforces.
pub(super) fn restrict(allowed: &Allowed) -> io::Result<RulesetStatus> {
    let all = AccessFs::from_all(NEWEST);
    let mut rules = Ruleset::default()
        .handle_access(all)
        .and_then(|r| r.handle_access(AccessNet::BindTcp | AccessNet::ConnectTcp))
        .and_then(Ruleset::create)
        .map_err(io::Error::other)?;
    for (path, reach) in &allowed.paths {
        let Ok(fd) = PathFd::new(path) else { continue };
        let access =
            if path.is_dir() { reach.rights() } else { reach.rights() & AccessFs::from_file(NEWEST) };
        rules = rules.add_rule(PathBeneath::new(fd, access)).map_err(io::Error::other)?;
    }
    let listen = allowed.listen.iter().map(|port| (*port, AccessNet::BindTcp));
    let connect = allowed.connect.iter().map(|port| (*port, AccessNet::ConnectTcp));
    for (port, access) in listen.chain(connect) {
        rules = rules.add_rule(NetPort::new(port, access)).map_err(io::Error::other)?;
    }
    rules.restrict_self().map(|status| status.ruleset).map_err(io::Error::other)
}

impl Reach {
    fn rights(self) -> BitFlags<AccessFs> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        match self {
            Self::Read => read,
            Self::Change => {
                read | AccessFs::WriteFile
                    | AccessFs::Truncate
                    | AccessFs::MakeReg
                    | AccessFs::MakeSock
                    | AccessFs::RemoveFile
            }
        }
    }
}
