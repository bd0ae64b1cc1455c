//! x
use super::Kernel;
pub(super) fn run(_kernel: &mut Kernel) -> Result<(), String> {
    Ok(())
}
