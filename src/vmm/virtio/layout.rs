//! Where the devices are: one page and one interrupt each, by slot.

/// The first page; RAM below 4 GiB ends before it.
const FIRST_ADDRESS: u64 = 0xd000_0000;
/// The size of a slot's registers and configuration.
pub const SLOT_BYTES: u64 = 0x1000;
/// IOAPIC inputs: first those that no ISA device ever had, then the free ones below.
const INTERRUPTS: [u32; 13] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11];
/// The most devices of a machine.
pub const MAX_DEVICES: usize = INTERRUPTS.len();

/// The guest-physical address of a slot.
pub const fn slot_address(slot: usize) -> u64 {
    FIRST_ADDRESS + slot as u64 * SLOT_BYTES
}

/// The global system interrupt of a slot, below [`MAX_DEVICES`].
pub const fn slot_interrupt(slot: usize) -> u32 {
    INTERRUPTS[slot]
}

/// The slot at an address, with the offset in it.
pub(super) fn locate(address: u64) -> Option<(usize, u64)> {
    let offset = address.checked_sub(FIRST_ADDRESS)?;
    let slot = usize::try_from(offset / SLOT_BYTES).ok()?;
    (slot < MAX_DEVICES).then_some((slot, offset % SLOT_BYTES))
}
