//! KVM's plain structures as bytes and back.

use std::mem::{MaybeUninit, size_of};

use kvm_bindings::{
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_sregs2,
    kvm_vcpu_events, kvm_xcrs,
};

/// A structure of integers without padding, for which every bit pattern is valid.
///
/// # Safety
/// The implementor is `repr(C)`, has no padding that the compiler could leave uninitialised (KVM
/// names its padding), and holds neither references nor types with invalid values.
pub unsafe trait Pod: Copy {}

macro_rules! pod {
    ($($name:ty: $bytes:literal),* $(,)?) => {$(
        const _: () = assert!(size_of::<$name>() == $bytes);
        // SAFETY: a bindgen structure of `linux/kvm.h`: integers, arrays and unions of them, with
        // padding as named fields; the size is the kernel's.
        unsafe impl Pod for $name {}
    )*};
}

pod!(
    kvm_regs: 144,
    kvm_sregs: 312,
    kvm_sregs2: 320,
    kvm_xcrs: 392,
    kvm_debugregs: 128,
    kvm_vcpu_events: 64,
    kvm_lapic_state: 1024,
    kvm_irqchip: 520,
    kvm_pit_state2: 112,
);

/// The bytes of `value`, as the kernel lays them out.
pub fn to_bytes<T: Pod>(value: &T) -> Vec<u8> {
    // SAFETY: `Pod` has no uninitialised bytes, and the slice ends with the value.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }.to_vec()
}

/// The value with these bytes; `None` unless they are exactly as many as it has. (kvm-bindings' own
/// deserialisation pads what is short and cuts what is long.)
pub fn from_bytes<T: Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() != size_of::<T>() {
        return None;
    }
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: exactly `size_of::<T>()` bytes are copied into the value, which initialises all of
    // it, and every bit pattern is a valid `Pod`.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), value.as_mut_ptr().cast::<u8>(), bytes.len());
        Some(value.assume_init())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_length_is_taken() {
        let regs = kvm_regs { rip: 0x1234, rflags: 2, ..Default::default() };
        let bytes = to_bytes(&regs);
        assert_eq!(from_bytes::<kvm_regs>(&bytes), Some(regs));
        assert_eq!(from_bytes::<kvm_regs>(&bytes[1..]), None);
        assert_eq!(from_bytes::<kvm_regs>(&[&bytes[..], &[0]].concat()), None);
    }
}
