//! No way out: from here on the system refuses this process, its threads and its children every outgoing connection.
//!
//! Contract: what listens and what is connected already goes on; nothing can take the lock off again. Only on Linux, by a
//! seccomp filter.

use std::{
    io,
    net::{TcpListener, TcpStream, UdpSocket},
};

/// A kind of socket that the system still knows and libraries do not name any more.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
const SOCK_PACKET: i32 = 10;

/// Locks the process, before it has done anything else.
///
/// # Errors
/// When the system has no such lock.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub(crate) fn lock() -> anyhow::Result<()> {
    use anyhow::Context as _;
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter_all_threads};

    let locked = || -> anyhow::Result<()> {
        let refuse = SeccompAction::Errno(libc::EPERM as u32);
        let filter = SeccompFilter::new(rules()?, SeccompAction::Allow, refuse, std::env::consts::ARCH.try_into()?)?;
        let program: BpfProgram = filter.try_into()?;
        Ok(apply_filter_all_threads(&program)?)
    };
    locked().context(
        "this system cannot lock outgoing connections (seccomp)\nhint: --offline keeps QwenKit from opening any, without the system's help",
    )
}

/// As above.
#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
pub(crate) fn lock() -> anyhow::Result<()> {
    Err(crate::failure::usage(
        "--air-gap needs Linux, whose seccomp locks outgoing connections\nhint: --offline keeps QwenKit from opening any, without the system's help",
    ))
}

/// The system calls that are refused, by what arguments; no argument means always.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
fn rules() -> Result<std::collections::BTreeMap<i64, Vec<seccompiler::SeccompRule>>, seccompiler::BackendError> {
    use seccompiler::{
        SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as Condition, SeccompRule as Rule,
    };

    let unless_one_of = |argument: u8, allowed: [i32; 2]| {
        let differs = |value: i32| Condition::new(argument, Len::Dword, Op::Ne, value as u64);
        Rule::new(vec![differs(allowed[0])?, differs(allowed[1])?])
    };
    let kinds = [libc::SOCK_DGRAM, libc::SOCK_RAW, libc::SOCK_RDM, libc::SOCK_SEQPACKET, libc::SOCK_DCCP, SOCK_PACKET];
    // The upper bits of a kind are flags.
    let is_kind = |kind: i32| Rule::new(vec![Condition::new(1, Len::Dword, Op::MaskedEq(0xf), kind as u64)?]);
    // Sockets of TCP alone, which send nothing before they are connected; those of a server are, by their clients.
    let mut sockets = vec![
        unless_one_of(0, [libc::AF_INET, libc::AF_INET6])?,
        unless_one_of(2, [libc::IPPROTO_IP, libc::IPPROTO_TCP])?,
    ];
    for kind in kinds {
        sockets.push(is_kind(kind)?);
    }
    let to_an_address = Rule::new(vec![Condition::new(4, Len::Qword, Op::Ne, 0)?])?;
    let calls = [
        (libc::SYS_connect, Vec::new()),
        (libc::SYS_socket, sockets),
        (libc::SYS_sendto, vec![to_an_address]),
        // Their addresses lie behind a pointer, where a filter cannot look; nothing here uses them.
        (libc::SYS_sendmsg, Vec::new()),
        (libc::SYS_sendmmsg, Vec::new()),
        // A way to do all of these without a call.
        (libc::SYS_io_uring_setup, Vec::new()),
    ];
    #[cfg(target_arch = "x86_64")]
    let calls = calls.clone().into_iter().chain(calls.into_iter().map(|(call, rules)| (as_x32(call), rules)));
    Ok(calls.into_iter().collect())
}

/// The same call by programs with short pointers, which some systems run beside the others under numbers of their own.
#[cfg(all(target_os = "linux", target_arch = "x86_64", target_pointer_width = "64"))]
fn as_x32(call: i64) -> i64 {
    let number = match call {
        libc::SYS_sendmsg => 518,
        libc::SYS_sendmmsg => 538,
        same => same,
    };
    number | 0x4000_0000
}

/// Tries to go out, no further than to this machine itself. Returns what the system says.
pub(crate) fn probe() -> String {
    let tcp = TcpListener::bind(("127.0.0.1", 0)).and_then(|l| TcpStream::connect(l.local_addr()?)).map(drop);
    let udp = UdpSocket::bind(("127.0.0.1", 0)).and_then(|socket| socket.send_to(b"?", ("127.0.0.1", 9))).map(drop);
    let is_refused = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    match (tcp, udp) {
        (Err(tcp), Err(udp)) if is_refused(&tcp) && is_refused(&udp) => {
            "closed: the system refuses this process outgoing connections".to_owned()
        }
        (Ok(()), Ok(())) => {
            "open; only `pull` uses it, --offline forbids it that, and --air-gap has the system refuse it".to_owned()
        }
        (tcp, udp) => {
            let told =
                |result: io::Result<()>| result.map_or_else(|error| error.to_string(), |()| "possible".to_owned());
            format!(
                "not known: a connection (TCP) to this machine itself: {}; a message (UDP): {}",
                told(tcp),
                told(udp)
            )
        }
    }
}
