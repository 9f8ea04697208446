//! The system calls that functions cannot make: those that Docker's default profile denies to a container
//! without capabilities (moby/profiles, `seccomp/default.json`).
//!
//! Docker lists what is allowed. Here the list is the rest, because the kernel evaluates a filter for every
//! system call number when it is installed, and this list is a fifth as long. System calls that are newer
//! than the list do not exist for functions, as with Docker.
//!
//! Not listed are system calls that no kernel implements any more, such as `create_module`.

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};
use std::collections::BTreeMap;

/// The first system call that this list does not know: `open_tree_attr` of Linux 6.15. The calls of 32 bits
/// in 64 (x32) have higher numbers too.
const UNKNOWN_MIN: u32 = 467;
// From Linux 6.8, on all architectures. The crate `libc` does not have them.
const SYS_LSM_GET_SELF_ATTR: i64 = 459;
const SYS_LSM_SET_SELF_ATTR: i64 = 460;
const SYS_LSM_LIST_MODULES: i64 = 461;

/// They fail with EPERM.
const DENIED: &[i64] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_get_mempolicy,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    SYS_LSM_GET_SELF_ATTR,
    SYS_LSM_LIST_MODULES,
    SYS_LSM_SET_SELF_ATTR,
    libc::SYS_mbind,
    libc::SYS_migrate_pages,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_move_pages,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_madvise,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_set_mempolicy,
    libc::SYS_set_mempolicy_home_node,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
    #[cfg(target_arch = "x86_64")]
    libc::SYS__sysctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_sysfs,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ustat,
];

/// Flags of `clone` that make a namespace. In its own user namespace a program has all capabilities, and with
/// them it reaches much more of the kernel.
const NAMESPACE_FLAGS: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];
/// Address families that Docker denies: the crypto of the kernel, and the sockets of virtual machines.
const DENIED_FAMILIES: [libc::c_int; 2] = [libc::AF_ALG, libc::AF_VSOCK];
/// Values of `personality` that Docker allows: Linux, Linux with 32 bits, both with an `uname` of Linux 2.6,
/// and the question for the current one.
const ALLOWED_PERSONALITIES: [u32; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// They fail with ENOSYS. The flags of `clone3` are in memory, where a filter cannot read them. With this
/// error the C library uses `clone`.
const ABSENT: &[i64] = &[libc::SYS_clone3];
/// They fail with ENOSYS if no control group bounds the memory. Each gives memory that belongs to no process,
/// so that nothing else can measure or bound it.
const ABSENT_WITHOUT_GROUPS: &[i64] =
    &[libc::SYS_memfd_create, libc::SYS_memfd_secret, libc::SYS_msgget, libc::SYS_shmget];

// Classic BPF: `code` of an instruction.
const LOAD: u16 = 0x20;
const IF_EQUAL: u16 = 0x15;
const IF_NOT_BELOW: u16 = 0x35;
const RETURN: u16 = 0x06;
/// Offset of the system call number in what a filter reads (`seccomp_data`).
const NUMBER: u32 = 0;

/// The filters of a program, as the kernel takes them. If several match, the kernel takes the strictest.
#[derive(Debug)]
pub(super) struct SyscallFilters {
    denied: Vec<u8>,
    absent: Vec<u8>,
}

impl SyscallFilters {
    /// The error is a sentence.
    pub(super) fn compile(has_memory_group: bool) -> Result<Self, String> {
        let failed = |e: seccompiler::BackendError| format!("the seccomp filter cannot be compiled: {e}");
        Ok(Self { denied: bytes(&denied().map_err(failed)?), absent: bytes(&absent(has_memory_group)) })
    }

    pub(super) fn programs(&self) -> [&[u8]; 2] {
        [&self.denied, &self.absent]
    }
}

/// The filter of what fails with EPERM. A program for another architecture is killed at its first call.
fn denied() -> Result<BpfProgram, seccompiler::BackendError> {
    let is =
        |operator, value: u32| SeccompCondition::new(0, SeccompCmpArgLen::Dword, operator, u64::from(value));
    let any_of = |operators: Vec<(SeccompCmpOp, u32)>| -> Result<Vec<SeccompRule>, _> {
        operators.into_iter().map(|(operator, value)| SeccompRule::new(vec![is(operator, value)?])).collect()
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = DENIED.iter().map(|call| (*call, Vec::new())).collect();
    let flags = NAMESPACE_FLAGS.map(i32::cast_unsigned);
    let makes_namespace = flags.map(|flag| (SeccompCmpOp::MaskedEq(u64::from(flag)), flag));
    rules.insert(libc::SYS_clone, any_of(makes_namespace.to_vec())?);
    let families = DENIED_FAMILIES.map(|family| (SeccompCmpOp::Eq, family.cast_unsigned()));
    rules.insert(libc::SYS_socket, any_of(families.to_vec())?);
    let others: Result<Vec<_>, _> =
        ALLOWED_PERSONALITIES.iter().map(|allowed| is(SeccompCmpOp::Ne, *allowed)).collect();
    rules.insert(libc::SYS_personality, vec![SeccompRule::new(others?)?]);
    let eperm = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let target = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, SeccompAction::Allow, eperm, target)?.try_into()
}

/// The filter of what fails with ENOSYS. It needs no check of the architecture: the other filter has one.
fn absent(has_memory_group: bool) -> BpfProgram {
    let more: &[i64] = if has_memory_group { &[] } else { ABSENT_WITHOUT_GROUPS };
    let numbers: Vec<u32> =
        ABSENT.iter().chain(more).filter_map(|number| u32::try_from(*number).ok()).collect();
    let one = |code, k, jt| sock_filter { code, jt, jf: 0, k };
    let count = u8::try_from(numbers.len()).unwrap_or(u8::MAX - 1);
    // A jump skips that many instructions. All lead to the last one.
    let mut program = vec![one(LOAD, NUMBER, 0), one(IF_NOT_BELOW, UNKNOWN_MIN, count + 1)];
    program.extend(numbers.iter().zip((1..=count).rev()).map(|(number, skip)| one(IF_EQUAL, *number, skip)));
    program.push(one(RETURN, libc::SECCOMP_RET_ALLOW, 0));
    program.push(one(RETURN, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned(), 0));
    program
}

/// The memory of an array of `struct sock_filter`.
fn bytes(program: &[sock_filter]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(program.len() * 8);
    for instruction in program {
        bytes.extend(instruction.code.to_ne_bytes());
        bytes.extend([instruction.jt, instruction.jf]);
        bytes.extend(instruction.k.to_ne_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | 1;
    const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | 38;
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const AUDIT_ARCH: u32 = if cfg!(target_arch = "x86_64") { 0xc000_003e } else { 0xc000_00b7 };

    /// What the kernel would return for a call.
    fn run(program: &[sock_filter], arch: u32, number: u32, argument: u64) -> u32 {
        let (mut at, mut loaded) = (0, 0_u32);
        loop {
            let sock_filter { code, jt, jf, k } = program[at].clone();
            let jump = |is: bool| usize::from(if is { jt } else { jf });
            at += 1;
            match code {
                LOAD => {
                    loaded = match k {
                        0 => number,
                        4 => arch,
                        16 => argument as u32,
                        20 => (argument >> 32) as u32,
                        other => panic!("loads {other}"),
                    };
                }
                IF_EQUAL => at += jump(loaded == k),
                0x25 => at += jump(loaded > k),
                IF_NOT_BELOW => at += jump(loaded >= k),
                0x05 => at += k as usize,
                0x54 => loaded &= k,
                RETURN => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    /// What both filters make of a call: the kernel takes the lower of these.
    fn decide(has_memory_group: bool, number: i64, argument: u64) -> u32 {
        let number = number as u32;
        let denied = run(&denied().unwrap(), AUDIT_ARCH, number, argument);
        denied.min(run(&absent(has_memory_group), AUDIT_ARCH, number, argument))
    }

    #[test]
    fn calls_are_denied_absent_or_allowed() {
        for (call, argument, expected) in [
            (libc::SYS_read, 0, ALLOW),
            (libc::SYS_execve, 0, ALLOW),
            (libc::SYS_ptrace, 0, ALLOW),
            (libc::SYS_mount, 0, EPERM),
            (libc::SYS_unshare, 0, EPERM),
            (libc::SYS_setns, 0, EPERM),
            (libc::SYS_bpf, 0, EPERM),
            (libc::SYS_keyctl, 0, EPERM),
            (libc::SYS_io_uring_setup, 0, EPERM),
            (libc::SYS_vhangup, 0, EPERM),
            (SYS_LSM_LIST_MODULES, 0, EPERM),
            (libc::SYS_clone, 17, ALLOW),
            (libc::SYS_clone, 0x003d_0f00, ALLOW),
            (libc::SYS_clone, 17 | libc::CLONE_NEWUSER as u64, EPERM),
            (libc::SYS_clone, libc::CLONE_NEWNS as u64, EPERM),
            (libc::SYS_clone, libc::CLONE_NEWNET as u64 | 1 << 40, EPERM),
            (libc::SYS_clone3, 0, ENOSYS),
            (libc::SYS_socket, libc::AF_INET as u64, ALLOW),
            (libc::SYS_socket, libc::AF_UNIX as u64, ALLOW),
            (libc::SYS_socket, 39, ALLOW),
            (libc::SYS_socket, libc::AF_ALG as u64, EPERM),
            (libc::SYS_socket, libc::AF_VSOCK as u64, EPERM),
            (libc::SYS_personality, 0, ALLOW),
            (libc::SYS_personality, 0xffff_ffff, ALLOW),
            (libc::SYS_personality, 0x0040_0000, EPERM),
            (i64::from(UNKNOWN_MIN) - 1, 0, ALLOW),
            (i64::from(UNKNOWN_MIN), 0, ENOSYS),
            (0x4000_0000 | libc::SYS_read, 0, ENOSYS),
            (-1, 0, ENOSYS),
        ] {
            assert_eq!(decide(true, call, argument), expected, "call {call} with {argument:#x}");
            assert_eq!(decide(false, call, argument), expected, "call {call} with {argument:#x}");
        }
        for call in ABSENT_WITHOUT_GROUPS {
            assert_eq!((decide(true, *call, 0), decide(false, *call, 0)), (ALLOW, ENOSYS), "call {call}");
        }
    }

    #[test]
    fn a_program_for_another_architecture_is_killed() {
        for arch in [0x4000_0003, 0x4000_0028, 0] {
            let found = run(&denied().unwrap(), arch, 0, 0);
            assert_eq!(found, libc::SECCOMP_RET_KILL_PROCESS, "{arch:#x}");
        }
    }

    #[test]
    fn filters_fit_into_the_kernel() {
        let filters = SyscallFilters::compile(false).unwrap();
        for program in filters.programs() {
            assert!(program.len() % 8 == 0 && program.len() / 8 < 4096, "{} bytes", program.len());
        }
    }
}
