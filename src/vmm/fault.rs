//! Fault points: places where an import fails on purpose, for drills.

use super::LocalConfig;
use super::VmmError;
use super::x86::restore::FaultTrap;

/// Where an import fails on purpose; nowhere in builds without the feature `fault-points`.
#[derive(Clone, Debug, Default)]
pub(super) struct FaultPoint {
    #[cfg(feature = "fault-points")]
    section: Option<String>,
    /// What is refused while a vCPU is restored.
    pub trap: FaultTrap,
}

#[cfg(feature = "fault-points")]
impl FaultPoint {
    pub fn of(local: &LocalConfig) -> Self {
        let text = local.fault.clone().or_else(|| std::env::var("VMFERRY_FAULT_POINT").ok());
        let text = text.unwrap_or_default();
        let point = text
            .strip_prefix("vcpu:")
            .and_then(|rest| rest.split_once(':'))
            .and_then(|(number, group)| Some((number.parse().ok()?, group.to_lowercase())));
        Self { section: text.strip_prefix("import:").map(Into::into), trap: FaultTrap { point } }
    }

    pub fn at(&self, section: &str) -> Result<(), VmmError> {
        match self.section.as_deref() == Some(section) {
            true => Err(VmmError::FaultPoint(section.into())),
            false => Ok(()),
        }
    }
}

#[cfg(not(feature = "fault-points"))]
impl FaultPoint {
    pub fn of(_: &LocalConfig) -> Self {
        Self::default()
    }

    pub fn at(&self, _: &str) -> Result<(), VmmError> {
        Ok(())
    }
}
