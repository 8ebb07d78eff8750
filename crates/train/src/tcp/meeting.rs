//! Where ranks meet, by the variables that torchrun sets: at MASTER_ADDR, at a port that follows from MASTER_PORT.
//!
//! Torchrun's own process on the first machine listens at MASTER_PORT for as long as the job lasts, and says so by
//! TORCHELASTIC_USE_AGENT_STORE, as PyTorch's `torch/distributed/rendezvous.py` reads it; nobody else can then. Not here: what is said there (`start`).

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs},
};

use crate::{error::Error, launch::Launched};

/// How far behind torchrun's port ranks meet: farther than the ports of jobs that are counted up from 29500.
const APART: u16 = 1000;
/// Ports from there on, of which rank 0 takes the first that is free: torchrun may choose its own by chance.
const PORTS: u16 = 8;

/// The place and the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meeting {
    /// A name or an address of the first machine.
    pub host: String,
    /// Ports there, of which rank 0 takes the first that is free.
    pub ports: Vec<u16>,
    /// What tells this job's ranks from those of others.
    pub job: String,
    /// Ranks.
    pub count: usize,
    /// Whether ranks are known to be on other machines, which do not reach an address of this machine alone.
    pub is_wide: bool,
}

impl Meeting {
    /// Of a launched process, by variables that `variable` reads.
    ///
    /// # Errors
    /// When MASTER_ADDR or MASTER_PORT is missing, or a port is none.
    pub fn by_variables(launched: &Launched, variable: impl Fn(&str) -> Option<String>) -> Result<Meeting, Error> {
        let given = |name: &str| variable(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
        let needed = |name: &str| given(name).ok_or_else(|| launched.lacks(name));
        let port = |name: &str, text: &str| {
            text.parse()
                .ok()
                .filter(|port: &u16| *port > 0)
                .ok_or_else(|| Error::Launch { what: format!("{name} is `{text}`, and not a port from 1 to 65535") })
        };
        let host = needed("MASTER_ADDR")?.trim_matches(['[', ']']).to_owned();
        let of_torch = port("MASTER_PORT", &needed("MASTER_PORT")?)?;
        let ports = match given("QWENKIT_MASTER_PORT") {
            Some(text) => vec![port("QWENKIT_MASTER_PORT", &text)?],
            None if given("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True") => {
                let first = of_torch.checked_add(APART).filter(|first| first.checked_add(PORTS).is_some());
                let first = first.unwrap_or(of_torch - APART);
                (first..first + PORTS).collect()
            }
            None => vec![of_torch],
        };
        let number = |name: &str| given(name)?.parse::<usize>().ok();
        let is_wide = number("LOCAL_WORLD_SIZE").is_some_and(|local| local < launched.count)
            || number("SLURM_STEP_NUM_NODES").is_some_and(|machines| machines > 1);
        let run: String = given("TORCHELASTIC_RUN_ID").unwrap_or_else(|| "none".to_owned()).chars().take(128).collect();
        let job = format!("run {run}, MASTER_PORT {of_torch}, {} ranks", launched.count);
        Ok(Meeting { host, ports, job, count: launched.count, is_wide })
    }

    /// Listens there, as rank 0 does.
    ///
    /// # Errors
    /// When this machine has no such address, or no port of it is free.
    pub fn listen(&self) -> Result<TcpListener, Error> {
        let all = |what: String| Error::NotMet { what: format!("rank 0 cannot listen: {what}") };
        let mut places = self.places().map_err(|error| all(error.to_string()))?;
        // A machine's own name often stands for its loopback in /etc/hosts.
        if self.is_wide && places.iter().all(|place| place.ip().is_loopback()) {
            places = self.anywhere(places.first().is_some_and(SocketAddr::is_ipv6));
        }
        let (mut why, mut is_held) = (format!("`{}` has no address", self.host), false);
        for place in places {
            match TcpListener::bind(place) {
                Ok(listener) => return Ok(listener),
                // That a port is held says more than that a family of addresses is missing.
                Err(error) if is_held && error.kind() != ErrorKind::AddrInUse => {}
                Err(error) if error.kind() == ErrorKind::AddrNotAvailable => {
                    why = format!("`{}` ({}) is no address of this machine, which rank 0 is on", self.host, place.ip());
                }
                Err(error) => {
                    is_held |= error.kind() == ErrorKind::AddrInUse;
                    why = format!("{place}: {error}");
                }
            }
        }
        Err(all(why))
    }

    /// All addresses of this machine with every port: of the family by which the host is known before the other, as a system may keep the
    /// two apart, and who calls by one would not come in by the other.
    fn anywhere(&self, is_ipv6: bool) -> Vec<SocketAddr> {
        let families: [IpAddr; 2] = match is_ipv6 {
            true => [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()],
            false => [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        };
        families.iter().flat_map(|ip| self.ports.iter().map(|port| SocketAddr::new(*ip, *port))).collect()
    }

    /// Every address of the host with every port, in order of ports.
    ///
    /// # Errors
    /// When the name is unknown.
    pub(super) fn places(&self) -> io::Result<Vec<SocketAddr>> {
        let found = (&self.host[..], 0).to_socket_addrs();
        let found = found.map_err(|error| io::Error::new(error.kind(), format!("`{}`: {error}", self.host)))?;
        let mut addresses: Vec<_> = found.map(|place| place.ip()).collect();
        addresses.dedup();
        let at = |port: &u16| addresses.iter().map(|address| SocketAddr::new(*address, *port)).collect::<Vec<_>>();
        Ok(self.ports.iter().flat_map(at).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn met(more: &[(&str, &str)]) -> Result<Meeting, String> {
        let usual = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")];
        // The last of a name counts.
        let all = [&usual[..], more].concat();
        let variable = |name: &str| all.iter().rev().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        let launched = Launched::by_variables(variable).unwrap().unwrap();
        Meeting::by_variables(&launched, variable).map_err(|error| error.to_string())
    }

    #[test]
    fn the_port_is_torchs_unless_torchrun_holds_it() {
        let ports = |more: &[(&str, &str)]| met(more).unwrap().ports;
        let held = ("TORCHELASTIC_USE_AGENT_STORE", "True");
        assert_eq!(ports(&[]), [29500]);
        assert_eq!(ports(&[("TORCHELASTIC_USE_AGENT_STORE", "False")]), [29500]);
        assert_eq!(ports(&[held]), (30500..30508).collect::<Vec<u16>>());
        for port in ["64527", "64528", "65535"] {
            let found = ports(&[held, ("MASTER_PORT", port)]);
            assert!(found.len() == 8 && !found.contains(&port.parse().unwrap()), "{port}: {found:?}");
        }
        assert_eq!(ports(&[held, ("QWENKIT_MASTER_PORT", "7000")]), [7000]);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        for (name, value) in
            [("MASTER_ADDR", ""), ("MASTER_PORT", ""), ("MASTER_PORT", "0"), ("QWENKIT_MASTER_PORT", "http")]
        {
            let error = met(&[(name, value)]).unwrap_err();
            assert!(error.contains(name), "{error}");
        }
        assert_eq!(met(&[("MASTER_ADDR", "[::1]")]).unwrap().host, "::1");
    }

    #[test]
    fn jobs_are_told_apart_and_machines_counted() {
        let job = |more: &[(&str, &str)]| met(more).unwrap().job;
        for other in [("MASTER_PORT", "29501"), ("WORLD_SIZE", "3"), ("TORCHELASTIC_RUN_ID", "x")] {
            assert_ne!(job(&[]), job(&[other]));
        }
        // Every machine may have another name for the first one.
        assert_eq!(job(&[]), job(&[("MASTER_ADDR", "first"), ("RANK", "0"), ("TORCHELASTIC_RESTART_COUNT", "1")]));
        let is_wide = |name: &str, value: &str| met(&[(name, value)]).unwrap().is_wide;
        assert!(is_wide("LOCAL_WORLD_SIZE", "1") && !is_wide("LOCAL_WORLD_SIZE", "2") && !met(&[]).unwrap().is_wide);
        assert!(is_wide("SLURM_STEP_NUM_NODES", "2") && !is_wide("SLURM_STEP_NUM_NODES", "1"));
    }

    #[test]
    fn the_first_free_port_is_taken_and_loopback_stays_loopback() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = held.local_addr().unwrap().port();
        // Any free port stands for the next one.
        let meeting = Meeting { ports: vec![port, 0], ..met(&[]).unwrap() };
        let listener = meeting.listen().unwrap().local_addr().unwrap();
        assert!(listener.ip().is_loopback() && listener.port() != port);
        let error = Meeting { ports: vec![port], ..meeting.clone() }.listen().unwrap_err().to_string();
        assert!(error.contains(&port.to_string()) && error.contains("QWENKIT_MASTER_PORT"), "{error}");
        let wide = Meeting { is_wide: true, ..meeting.clone() }.listen().unwrap().local_addr().unwrap();
        assert!(wide.ip().is_unspecified() && wide.is_ipv4());
        let anywhere = |is_ipv6: bool| Meeting { ports: vec![1, 2], ..meeting.clone() }.anywhere(is_ipv6);
        let (four, six) = (["0.0.0.0:1", "0.0.0.0:2"], ["[::]:1", "[::]:2"]);
        let places = |all: [[&str; 2]; 2]| all.concat().iter().map(|place| place.parse().unwrap()).collect::<Vec<_>>();
        assert_eq!((anywhere(false), anywhere(true)), (places([four, six]), places([six, four])));
        // An address that is kept for documents (RFC 5737) is no machine's.
        let error = Meeting { host: "192.0.2.1".to_owned(), ..meeting }.listen().unwrap_err().to_string();
        assert!(error.contains("is no address of this machine"), "{error}");
    }
}
