use super::ways::{self, Interface};
use super::*;
use socket2::Socket;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;

const SECOND: Duration = Duration::from_secs(1);

/// Runs `rank` for every end of a star, each on a thread, and gives the results by rank.
fn on_all<T: Send>(star: Vec<Control>, rank: impl Fn(Control) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = star.into_iter().map(|control| scope.spawn(|| rank(control))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn meet(size: usize, make: impl Fn(usize) -> Result<Control> + Sync) -> Vec<Result<Control>> {
    thread::scope(|scope| {
        let make = &make;
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || make(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn unique_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("lockstep-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed))
}

fn party(rank: usize, size: usize, timeout: Duration) -> Party {
    Party { rank, size, stars: 2, timeout }
}

/// The first of the two stars of rank 0 and the others at a socket, or at a port of the loopback.
fn unix(rank: usize, size: usize, name: &str, timeout: Duration) -> Result<Control> {
    ways::at_socket(party(rank, size, timeout), name).map(|mut stars| stars.remove(0))
}

fn tcp(rank: usize, size: usize, ports: &[u16], job: &str) -> Result<Control> {
    ways::at_ports(party(rank, size, 20 * SECOND), "127.0.0.1", ports, job, &loopback())
        .map(|mut stars| stars.remove(0))
}

fn loopback() -> Interface {
    Interface::choose(Some("127.0.0.0/8")).unwrap()
}

/// What every star must do: gather messages of different lengths, broadcast, and pass descriptors.
fn exercise(mut control: Control) {
    let (rank, size) = (control.rank(), control.size());
    let message = |rank: usize| vec![rank as u8; 1000 * rank];
    let all = control.all_gather(&message(rank)).unwrap();
    assert!((0..size).all(|rank| all[rank] == message(rank)) && all.len() == size);
    assert_eq!(control.broadcast(format!("from {rank}").as_bytes()).unwrap(), b"from 0");

    let hosts = control.hosts().unwrap();
    assert!(hosts.len() == size && hosts.iter().all(|host| *host == hosts[0]));
    let mut mine = tempfile::tempfile().unwrap();
    write!(mine, "file of {rank}").unwrap();
    let fds = control.exchange_fds(mine.as_fd()).unwrap();
    // The offset of a passed descriptor is shared: one reader at a time.
    for reader in 0..size {
        if reader == rank {
            for (owner, fd) in fds.iter().enumerate() {
                let mut text = String::new();
                let mut file = File::from(fd.try_clone().unwrap());
                file.rewind().unwrap();
                file.read_to_string(&mut text).unwrap();
                assert_eq!(text, format!("file of {owner}"));
            }
        }
        control.all_gather(&[]).unwrap();
    }
}

#[test]
fn stars_of_pairs_gather_broadcast_and_pass_descriptors() {
    for size in [1, 2, 3, 8] {
        on_all(Control::local(size).unwrap(), exercise);
    }
}

#[test]
fn stars_over_tcp_and_abstract_sockets_do_the_same_and_can_be_made_twice_at_one_place() {
    let (port, name) = (free_port(), unique_name());
    for size in [1, 2, 5] {
        let made = meet(size, |rank| {
            let mut stars = ways::at_ports(party(rank, size, 20 * SECOND), "127.0.0.1", &[port], "", &loopback())?;
            stars.extend(ways::at_socket(party(rank, size, 20 * SECOND), &name)?);
            stars.extend(ways::at_socket(party(rank, size, 20 * SECOND), &name)?);
            assert_eq!(stars.len(), 6);
            stars.into_iter().for_each(exercise);
            Control::from_fds(0, 1, Vec::new())
        });
        made.into_iter().for_each(|result| drop(result.unwrap()));
    }
}

#[test]
fn ports_at_which_others_are_are_passed_over() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let talking = TcpListener::bind("127.0.0.1:0").unwrap();
    let ports = [silent.local_addr().unwrap().port(), talking.local_addr().unwrap().port(), free_port()];
    let (other_job, other_port) = (unique_name(), free_port());
    thread::scope(|scope| {
        scope.spawn(|| talking.accept().map(|(mut stream, _)| stream.write_all(b"220 this is not a rank\r\n")));
        // Another job's rank 0 at the first port that this one's ranks try, and another rank at this one's port.
        let other = scope.spawn(|| meet(2, |rank| tcp(rank, 2, &[other_port], &other_job)));
        let ports = [&[other_port][..], &ports].concat();
        let met = meet(3, |rank| tcp(rank, 3, &ports[if rank == 0 { 1 } else { 0 }..], "job"));
        on_all(met.into_iter().map(Result::unwrap).collect(), exercise);
        on_all(other.join().unwrap().into_iter().map(Result::unwrap).collect(), exercise);
    });
}

#[test]
fn a_port_that_is_taken_is_told_to_all_at_once() {
    let stranger = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = stranger.local_addr().unwrap().port();
    let begun = Instant::now();
    let results = meet(2, |rank| tcp(rank, 2, &[port], ""));
    let expected =
        [format!("cannot listen at port {port}, which MASTER_PORT names"), "is not rank 0 of this job".into()];
    for (result, words) in results.into_iter().zip(expected) {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        let text = error.to_string();
        assert!(text.contains(&words) && text.contains("MASTER_PORT to"), "{text}");
    }
    assert!(begun.elapsed() < 15 * SECOND, "{:?}", begun.elapsed());
}

#[test]
fn a_rank_whose_first_connection_was_lost_may_come_again() {
    let port = free_port();
    let results = meet(2, |rank| {
        if rank == 1 {
            let token = blake3::hash(b"");
            let hello =
                [&b"lockstep"[..], &[2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0], &token.as_bytes()[..8]].concat();
            let mut heard = [0; 16];
            // Until rank 0 listens and has counted this one.
            while heard[..8] != *b"lockstep" {
                let stream = TcpStream::connect(("127.0.0.1", port));
                let said = stream.and_then(|mut stream| stream.write_all(&hello).and(stream.read_exact(&mut heard)));
                said.unwrap_or_else(|_| thread::sleep(SECOND / 100));
            }
        }
        tcp(rank, 2, &[port], "")
    });
    on_all(results.into_iter().map(Result::unwrap).collect(), exercise);
}

#[test]
fn a_name_that_does_not_resolve_is_told_with_both_ends() {
    let party = party(1, 2, SECOND);
    let error = ways::at_ports(party, "nohost.invalid", &[29500], "", &loopback()).unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);
    let text = error.to_string();
    for words in ["rank 1 on ", "reach rank 0 at nohost.invalid:29500", "does not resolve", "set MASTER_ADDR"] {
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn a_note_in_a_shared_folder_brings_ranks_together_and_is_taken_away() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lockstep-job_1.rendezvous");
    // Of a run that was killed: at one address nobody is, at the other somebody else.
    let stranger = TcpListener::bind("127.0.0.1:0").unwrap();
    let stale =
        format!("lockstep;2;00000000000000ff;gone;127.0.0.1:{};{}", free_port(), stranger.local_addr().unwrap());
    for old in [None, Some("half a no"), Some(stale.as_str())] {
        if let Some(old) = old {
            std::fs::write(&file, old).unwrap();
        }
        let met = meet(3, |rank| {
            if rank == 0 {
                thread::sleep(SECOND / 4);
            }
            let party = party(rank, 3, 60 * SECOND);
            ways::through_folder(party, folder.path(), "job@1", &loopback()).map(|mut stars| stars.remove(1))
        });
        on_all(met.into_iter().map(Result::unwrap).collect(), exercise);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left");
    }
}

#[test]
fn two_runs_that_meet_in_one_folder_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lockstep-2-ranks.rendezvous");
    let join = |rank| ways::through_folder(party(rank, 2, 20 * SECOND), folder.path(), "", &loopback());
    thread::scope(|scope| {
        let first = scope.spawn(|| join(0));
        while !file.exists() {
            thread::sleep(SECOND / 100);
        }
        let error = join(0).unwrap_err();
        assert!(error.to_string().contains("give each run a folder of its own"), "{error}");
        join(1).unwrap();
        first.join().unwrap().unwrap();
    });
}

/// What a process manager does, for `size` ranks, which are threads here.
fn process_manager(servers: Vec<Socket>) {
    let (values, barrier) = (std::sync::Mutex::new(String::new()), std::sync::Barrier::new(servers.len()));
    let serve = |server: Socket| {
        for line in BufReader::new(server.try_clone().unwrap()).lines() {
            let line = line.unwrap();
            let word =
                |key: &str| line.split(' ').find_map(|pair| pair.strip_prefix(key)).unwrap_or_default().to_string();
            let answer = match word("cmd=").as_str() {
                "init" => "cmd=response_to_init rc=0 pmi_version=1 pmi_subversion=1".to_string(),
                "get_my_kvsname" => "cmd=my_kvsname rc=0 kvsname=kvs_1".to_string(),
                "put" if word("kvsname=") == "kvs_1" => {
                    *values.lock().unwrap() = word("value=");
                    "cmd=put_result rc=0 msg=success".to_string()
                }
                "barrier_in" => {
                    barrier.wait();
                    "cmd=barrier_out rc=0".to_string()
                }
                "get" => format!("cmd=get_result rc=0 msg=success value={}", values.lock().unwrap()),
                "finalize" => "cmd=finalize_ack rc=0".to_string(),
                _ => "cmd=unknown rc=-1".to_string(),
            };
            (&server).write_all(format!("{answer}\n").as_bytes()).unwrap();
        }
    };
    thread::scope(|scope| servers.into_iter().for_each(|server| drop(scope.spawn(move || serve(server)))));
}

#[test]
fn a_process_manager_passes_rank_0s_address_on() {
    let (servers, clients): (Vec<_>, Vec<_>) = (0..3).map(|_| link::pair().unwrap()).unzip();
    let manager = thread::spawn(|| process_manager(servers.into_iter().map(Socket::from).collect()));
    let met = meet(3, |rank| {
        let fd = clients[rank].as_raw_fd();
        ways::through_pmi(party(rank, 3, 20 * SECOND), fd, false, &loopback()).map(|mut stars| stars.remove(0))
    });
    drop(clients);
    on_all(met.into_iter().map(Result::unwrap).collect(), exercise);
    manager.join().unwrap();
}

#[test]
fn a_process_manager_that_is_gone_or_refuses_is_named() {
    let refusal = |fd: i32| ways::through_pmi(party(0, 2, SECOND), fd, false, &loopback()).unwrap_err();
    let text = refusal(9999).to_string();
    assert!(text.contains("PMI_FD = 9999") && text.contains("set LOCKSTEP_RENDEZVOUS"), "{text}");

    let (server, client) = link::pair().unwrap();
    let text = refusal(client.as_raw_fd()).to_string();
    assert!(text.contains("did not answer \"init\"") && text.contains("timed out"), "{text}");
    let server = Socket::from(server);
    (&server).write_all(b"cmd=response_to_init rc=-1\n").unwrap();
    let text = refusal(client.as_raw_fd()).to_string();
    assert!(text.contains("it said \"cmd=response_to_init rc=-1\""), "{text}");
}

#[test]
fn a_rank_that_does_not_come_is_named_to_those_who_came() {
    let name = unique_name();
    let results = meet(3, |rank| match rank {
        1 => Ok(Control::new(0, 1, Vec::new(), SECOND)),
        _ => unix(rank, 3, &name, SECOND),
    });
    for rank in [0, 2] {
        let error = results[rank].as_ref().unwrap_err();
        assert_eq!(error.kind(), Kind::PeerLost);
        assert!(error.to_string().contains("ranks [1] of 3 did not come"), "{error}");
    }
}

#[test]
fn two_processes_with_one_rank_and_different_worlds_are_told_so() {
    for (second, expected) in [((1, 3), "came twice"), ((2, 4), "was told of 4 ranks, rank 0 of 3")] {
        let name = unique_name();
        let results = meet(3, |index| {
            let (rank, size) = [(0, 3), (1, 3), second][index];
            unix(rank, size, &name, 20 * SECOND)
        });
        let error = results[0].as_ref().unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().contains(expected), "{error}");
        assert!(results[2].as_ref().unwrap_err().to_string().contains(expected) || second.0 == 1);
    }
}

#[test]
fn strangers_at_the_port_neither_enter_nor_disturb() {
    let port = free_port();
    let results = meet(2, |rank| {
        if rank == 1 {
            let stranger = |bytes: &[u8]| loop {
                if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
                    return stream.write_all(bytes).map(|()| stream).unwrap();
                }
            };
            drop(stranger(b""));
            drop(stranger(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"));
        }
        tcp(rank, 2, &[port], "")
    });
    on_all(results.into_iter().map(Result::unwrap).collect(), exercise);
}

#[test]
fn a_rank_that_dies_or_is_silent_is_named_by_all() {
    for silent in [false, true] {
        let results = on_all(Control::local(3).unwrap(), |mut control| {
            control.set_timeout(if silent { SECOND / 10 } else { 20 * SECOND });
            if control.rank() == 2 {
                thread::sleep(if silent { SECOND } else { Duration::ZERO });
                return None;
            }
            Some(control.all_gather(b"here").unwrap_err())
        });
        for error in results.into_iter().flatten() {
            assert_eq!(error.kind(), Kind::PeerLost);
            assert!(error.to_string().contains("rank 2"), "{error}");
        }
    }
}
