//! Agreeing on a version and on features: overlapping ranges, and names.

use super::payload::{Hello, Problem, Refused, RefusedCode};

/// The version of the protocol that is described in docs/protocol.md.
pub const VERSION: u32 = 1;

/// A feature with this before its name is refused by a peer that does not know the name; without
/// it, the feature is merely left out.
pub const MUST_PREFIX: &str = "must:";

/// The feature by which pages may come after the guest.
pub const POSTCOPY: &str = "postcopy";

/// The most features that a HELLO may list.
const MAX_FEATURES: usize = 256;

/// What this side can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Supported {
    /// The oldest version.
    pub version_min: u32,
    /// The newest version.
    pub version_max: u32,
    /// Features by name.
    pub features: Vec<String>,
}

impl Default for Supported {
    /// [`VERSION`] alone, and every feature there is.
    fn default() -> Self {
        Self { version_min: VERSION, version_max: VERSION, features: vec![POSTCOPY.to_owned()] }
    }
}

/// What both sides can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The newest version that both speak.
    pub version: u32,
    /// Features that both know, without the prefix, in the order of the HELLO.
    pub features: Vec<String>,
}

/// Chooses what to speak with the peer that sent `hello`; the error is what to answer it.
pub fn negotiate(hello: &Hello, ours: &Supported) -> Result<Agreed, Refused> {
    let version = hello.version_max.min(ours.version_max);
    if version < hello.version_min.max(ours.version_min) {
        let range = |min, max| if min == max { format!("{min}") } else { format!("{min} to {max}") };
        return Err(Refused {
            code: RefusedCode::Version,
            message: format!(
                "no protocol version in common: the source (release {}) speaks {}, the destination {}",
                hello.release,
                range(hello.version_min, hello.version_max),
                range(ours.version_min, ours.version_max)
            ),
            problems: Vec::new(),
        });
    }
    if hello.features.len() > MAX_FEATURES {
        return Err(Refused {
            code: RefusedCode::Protocol,
            message: format!("HELLO lists more than {MAX_FEATURES} features"),
            problems: Vec::new(),
        });
    }
    let mut features = Vec::new();
    let mut missing = Vec::new();
    for offered in &hello.features {
        let name = offered.strip_prefix(MUST_PREFIX).unwrap_or(offered);
        if ours.features.iter().any(|f| f == name) {
            if !features.iter().any(|f| f == name) {
                features.push(name.to_owned());
            }
        } else if offered.starts_with(MUST_PREFIX) {
            missing.push(name);
        }
    }
    if missing.is_empty() {
        return Ok(Agreed { version, features });
    }
    let problem = |name: &&str| Problem {
        topic: "feature".to_owned(),
        text: format!("the source insists on feature {name}, which the destination does not have"),
    };
    Err(Refused {
        code: RefusedCode::Feature,
        message: format!("the destination lacks what the source insists on: {}", missing.join(", ")),
        problems: missing.iter().map(problem).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(min: u32, max: u32, features: &[&str]) -> Hello {
        Hello {
            version_min: min,
            version_max: max,
            release: "9.9".into(),
            host: String::new(),
            vm_uuid: String::new(),
            vm_name: String::new(),
            resume: false,
            superseded: None,
            channels: 1,
            features: features.iter().map(ToString::to_string).collect(),
            verify: false,
            peer_timeout_ms: 5000,
        }
    }

    fn ours() -> Supported {
        Supported { version_min: 2, version_max: 4, features: vec!["zstd".into(), "postcopy".into()] }
    }

    #[test]
    fn the_newest_common_version_is_taken() {
        for (min, max, version) in
            [(1, 2, Some(2)), (3, 9, Some(4)), (3, 3, Some(3)), (1, 1, None), (5, 9, None)]
        {
            let got = negotiate(&hello(min, max, &[]), &ours()).map(|a| a.version).ok();
            assert_eq!(got, version, "{min} to {max}");
        }
        let refused = negotiate(&hello(5, 9, &[]), &ours()).unwrap_err();
        assert_eq!(refused.code, RefusedCode::Version);
        assert!(refused.message.contains("5 to 9") && refused.message.contains("2 to 4"), "{refused}");
        // A range that is upside down is no range.
        assert!(negotiate(&hello(4, 2, &[]), &ours()).is_err());
    }

    #[test]
    fn optional_features_are_dropped_and_mandatory_ones_named() {
        let agreed = negotiate(&hello(1, 4, &["must:zstd", "lz4", "postcopy", "zstd"]), &ours()).unwrap();
        assert_eq!(agreed.features, ["zstd", "postcopy"]);
        let refused = negotiate(&hello(1, 4, &["must:tls", "must:lz4", "zstd"]), &ours()).unwrap_err();
        assert_eq!((refused.code, refused.problems.len()), (RefusedCode::Feature, 2));
        assert!(refused.message.ends_with("tls, lz4"), "{refused}");
    }
}
