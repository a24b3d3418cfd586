//! Names of CPUID feature bits, as Intel's SDM, AMD's APM and `/proc/cpuinfo` call them, and the
//! comparison of two CPUID tables by name.

use crate::state::CpuidEntry;

/// One 32-bit register of feature bits.
struct Word {
    function: u32,
    index: u32,
    /// 0 to 3: EAX, EBX, ECX, EDX.
    register: usize,
    /// Bit numbers and names, separated by spaces: `0:sse3`.
    names: &'static str,
    /// Bits that say what the guest has switched on, not what the CPU can do.
    ignore: u32,
}

const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

/// Every word of features that preflight compares.
const WORDS: &[Word] = &[
    Word {
        function: 1,
        index: 0,
        register: 2,
        names: "0:sse3 1:pclmulqdq 2:dtes64 3:monitor 4:ds-cpl 5:vmx 6:smx 7:est 8:tm2 9:ssse3 10:cnxt-id 11:sdbg \
                12:fma 13:cx16 14:xtpr 15:pdcm 17:pcid 18:dca 19:sse4.1 20:sse4.2 21:x2apic 22:movbe 23:popcnt \
                24:tsc-deadline 25:aes 26:xsave 27:osxsave 28:avx 29:f16c 30:rdrand 31:hypervisor",
        ignore: 1 << 27,
    },
    Word {
        function: 1,
        index: 0,
        register: 3,
        names: "0:fpu 1:vme 2:de 3:pse 4:tsc 5:msr 6:pae 7:mce 8:cx8 9:apic 11:sep 12:mtrr 13:pge 14:mca 15:cmov \
                16:pat 17:pse36 18:psn 19:clflush 21:ds 22:acpi 23:mmx 24:fxsr 25:sse 26:sse2 27:ss 28:ht 29:tm 31:pbe",
        ignore: 1 << 9 | 1 << 28,
    },
    Word {
        function: 7,
        index: 0,
        register: 1,
        names: "0:fsgsbase 1:tsc-adjust 2:sgx 3:bmi1 4:hle 5:avx2 6:fdp-excptn-only 7:smep 8:bmi2 9:erms 10:invpcid \
                11:rtm 12:cqm 13:fpcsds 14:mpx 15:rdt-a 16:avx512f 17:avx512dq 18:rdseed 19:adx 20:smap \
                21:avx512ifma 22:pcommit 23:clflushopt 24:clwb 25:intel-pt 26:avx512pf 27:avx512er 28:avx512cd \
                29:sha-ni 30:avx512bw 31:avx512vl",
        ignore: 0,
    },
    Word {
        function: 7,
        index: 0,
        register: 2,
        names: "0:prefetchwt1 1:avx512vbmi 2:umip 3:pku 4:ospke 5:waitpkg 6:avx512vbmi2 7:shstk 8:gfni 9:vaes \
                10:vpclmulqdq 11:avx512-vnni 12:avx512-bitalg 13:tme 14:avx512-vpopcntdq 16:la57 22:rdpid \
                23:key-locker 24:bus-lock-detect 25:cldemote 27:movdiri 28:movdir64b 29:enqcmd 30:sgx-lc 31:pks",
        ignore: 1 << 4,
    },
    Word {
        function: 7,
        index: 0,
        register: 3,
        names: "2:avx512-4vnniw 3:avx512-4fmaps 4:fsrm 5:uintr 8:avx512-vp2intersect 9:srbds-ctrl 10:md-clear \
                11:rtm-always-abort 13:tsx-force-abort 14:serialize 15:hybrid 16:tsxldtrk 18:pconfig 19:arch-lbr \
                20:ibt 22:amx-bf16 23:avx512-fp16 24:amx-tile 25:amx-int8 26:spec-ctrl 27:stibp 28:flush-l1d \
                29:arch-capabilities 30:core-capabilities 31:ssbd",
        ignore: 0,
    },
    Word {
        function: 7,
        index: 1,
        register: 0,
        names: "0:sha512 1:sm3 2:sm4 3:rao-int 4:avx-vnni 5:avx512-bf16 6:lass 7:cmpccxadd 8:arch-perfmon-ext 10:fzrm \
                11:fsrs 12:fsrc 17:fred 18:lkgs 19:wrmsrns 20:nmi-src 21:amx-fp16 22:hreset 23:avx-ifma 26:lam",
        ignore: 0,
    },
    Word {
        function: 7,
        index: 1,
        register: 3,
        names: "4:avx-vnni-int8 5:avx-ne-convert 8:amx-complex 10:avx-vnni-int16 14:prefetchiti 18:cet-sss 19:avx10",
        ignore: 0,
    },
    Word {
        function: 7,
        index: 2,
        register: 3,
        names: "0:psfd 1:ipred-ctrl 2:rrsba-ctrl 3:ddpd-u 4:bhi-ctrl 5:mcdt-no 6:uc-lock-disable",
        ignore: 0,
    },
    Word {
        function: 0xd,
        index: 0,
        register: 0,
        names: "0:xfeature-x87 1:xfeature-sse 2:xfeature-avx 3:xfeature-mpx-bndregs 4:xfeature-mpx-bndcsr \
                5:xfeature-avx512-opmask 6:xfeature-avx512-zmm-hi256 7:xfeature-avx512-hi16-zmm 9:xfeature-pku \
                17:xfeature-amx-tilecfg 18:xfeature-amx-tiledata 19:xfeature-apx",
        ignore: 0,
    },
    Word {
        function: 0xd,
        index: 1,
        register: 0,
        names: "0:xsaveopt 1:xsavec 2:xgetbv1 3:xsaves 4:xfd",
        ignore: 0,
    },
    Word {
        function: 0x4000_0001,
        index: 0,
        register: 0,
        names: "0:kvm-clocksource 1:kvm-nop-io-delay 2:kvm-mmu-op 3:kvm-clocksource2 4:kvm-async-pf 5:kvm-steal-time \
                6:kvm-pv-eoi 7:kvm-pv-unhalt 9:kvm-pv-tlb-flush 10:kvm-async-pf-vmexit 11:kvm-pv-send-ipi \
                12:kvm-poll-control 13:kvm-pv-sched-yield 14:kvm-async-pf-int 15:kvm-msi-ext-dest-id \
                16:kvm-hc-map-gpa-range 17:kvm-migration-control 24:kvm-clocksource-stable",
        ignore: 0,
    },
    Word {
        function: 0x8000_0001,
        index: 0,
        register: 2,
        names: "0:lahf-lm 1:cmp-legacy 2:svm 3:extapic 4:cr8-legacy 5:abm 6:sse4a 7:misalignsse 8:3dnowprefetch 9:osvw \
                10:ibs 11:xop 12:skinit 13:wdt 15:lwp 16:fma4 17:tce 19:nodeid-msr 21:tbm 22:topoext 23:perfctr-core \
                24:perfctr-nb 26:bpext 27:ptsc 28:perfctr-llc 29:mwaitx",
        ignore: 0,
    },
    Word {
        function: 0x8000_0001,
        index: 0,
        register: 3,
        names: "11:syscall 19:mp 20:nx 22:mmxext 25:fxsr-opt 26:pdpe1gb 27:rdtscp 29:lm 30:3dnowext 31:3dnow",
        // Bits 0 to 17, 23 and 24 repeat leaf 1 on AMD.
        ignore: 0x0183_f3ff,
    },
    Word {
        function: 0x8000_0007,
        index: 0,
        register: 3,
        names: "0:ts 1:fid 2:vid 3:ttp 4:tm 5:stc 7:hw-pstate 8:invtsc 9:cpb 10:aperfmperf",
        ignore: 0,
    },
    Word {
        function: 0x8000_0008,
        index: 0,
        register: 1,
        names: "0:clzero 1:irperf 2:xsaveerptr 4:rdpru 9:wbnoinvd 12:amd-ibpb 14:amd-ibrs 15:amd-stibp \
                17:amd-stibp-always-on 23:amd-ppin 24:amd-ssbd 25:virt-ssbd 26:amd-no-ssb 28:amd-psfd",
        ignore: 0,
    },
    Word {
        function: 0x8000_0021,
        index: 0,
        register: 0,
        names: "0:no-nested-data-bp 2:lfence-always-serializing 6:null-sel-clr-base 8:auto-ibrs 9:no-smm-ctl-msr \
                10:fsrs-amd 11:fsrc-amd 18:epsf 27:sbpb 28:ibpb-brtype 29:srso-no",
        ignore: 0,
    },
];

/// Every feature bit that is set in `wanted` and not in `host`, by name.
pub fn missing(wanted: &[CpuidEntry], host: &[CpuidEntry]) -> Vec<String> {
    let mut out = Vec::new();
    for word in WORDS {
        let lacking = value(wanted, word) & !value(host, word) & !word.ignore;
        out.extend((0..32).filter(|bit| lacking >> bit & 1 == 1).map(|bit| name(word, bit)));
    }
    out
}

fn value(table: &[CpuidEntry], word: &Word) -> u32 {
    table
        .iter()
        .find(|e| e.function == word.function && e.index == word.index)
        .map_or(0, |e| [e.eax, e.ebx, e.ecx, e.edx][word.register])
}

fn name(word: &Word, bit: u32) -> String {
    let place = format!("CPUID {:#x}.{} {} bit {bit}", word.function, word.index, REGISTERS[word.register]);
    let known = word.names.split_whitespace().find_map(|entry| {
        let (number, name) = entry.split_once(':')?;
        (number.parse() == Ok(bit)).then_some(name)
    });
    match known {
        Some(name) => format!("{name} ({place})"),
        None => place,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry { function, index, flags: 0, eax, ebx, ecx, edx }
    }

    #[test]
    fn missing_bits_have_names() {
        let wanted = [entry(1, 0, [0, 0, 1 << 13 | 1 << 27, 0]), entry(7, 0, [0, 1 << 16, 0, 1 << 0])];
        let host = [entry(7, 0, [0; 4])];
        assert_eq!(
            missing(&wanted, &host),
            vec![
                "cx16 (CPUID 0x1.0 ECX bit 13)",
                "avx512f (CPUID 0x7.0 EBX bit 16)",
                "CPUID 0x7.0 EDX bit 0"
            ]
        );
        assert!(missing(&host, &wanted).is_empty(), "more than wanted is no problem");
    }

    #[test]
    fn every_name_has_a_bit_of_its_own() {
        for word in WORDS {
            let mut seen = 0u32;
            for entry in word.names.split_whitespace() {
                let (bit, name) = entry.split_once(':').unwrap();
                let bit: u32 = bit.parse().unwrap();
                assert!(bit < 32 && seen >> bit & 1 == 0 && !name.is_empty(), "{entry}");
                seen |= 1 << bit;
            }
        }
    }
}
