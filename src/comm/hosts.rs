//! Which ranks share a host, and what follows for who talks to whom.
//!
//! Every rank owns its chunk of a buffer, whatever its host. A host takes part in another rank's chunk through one of its
//! ranks, the delegate for it: that one adds up what its host has for the chunk, sends it to the owner, and receives the
//! result for all. With L ranks on each of M hosts, rank l of a host talks to ranks l of the others: all L share the work
//! and the wire carries 2 (M - 1) / M of the buffer for each host, the least there is.
//!
//! What a host can add up by itself without changing the order of additions are whole subtrees of the pairwise tree over
//! all ranks. Ranks in blocks of equal powers of two are one subtree a host; in other layouts a host sends a few partial sums
//! instead of one, and the result keeps its bits.

use super::split;
use std::ops::Range;

/// The hosts of a world; hosts and the positions of ranks on them are numbered in the order of ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hosts {
    members: Vec<Vec<usize>>,
    /// By rank.
    host: Vec<usize>,
    /// By rank: which of its host's ranks it is.
    position: Vec<usize>,
}

impl Hosts {
    /// `keys`: by rank, equal for ranks of one host.
    pub fn new<T: PartialEq>(keys: &[T]) -> Hosts {
        let (mut firsts, mut members): (Vec<&T>, Vec<Vec<usize>>) = (Vec::new(), Vec::new());
        let (mut host, mut position) = (Vec::new(), Vec::new());
        for (rank, key) in keys.iter().enumerate() {
            let at = firsts.iter().position(|first| *first == key).unwrap_or_else(|| {
                firsts.push(key);
                members.push(Vec::new());
                members.len() - 1
            });
            host.push(at);
            position.push(members[at].len());
            members[at].push(rank);
        }
        Hosts { members, host, position }
    }

    /// Every rank by itself, even where some share a host.
    pub fn apart(size: usize) -> Hosts {
        Hosts::new(&(0..size).collect::<Vec<_>>())
    }

    /// The number of ranks.
    pub fn size(&self) -> usize {
        self.host.len()
    }
    /// The number of hosts.
    pub fn count(&self) -> usize {
        self.members.len()
    }
    /// The host of a rank.
    pub fn of(&self, rank: usize) -> usize {
        self.host[rank]
    }
    /// Which of its host's ranks a rank is.
    pub fn position(&self, rank: usize) -> usize {
        self.position[rank]
    }
    /// The ranks of a host.
    pub fn members(&self, host: usize) -> &[usize] {
        &self.members[host]
    }

    /// The rank of `host` that speaks for it about the chunk of `owner`, a rank of another host.
    pub fn delegate(&self, host: usize, owner: usize) -> usize {
        let members = &self.members[host];
        members[self.position[owner] % members.len()]
    }

    /// The owners on other hosts for whose chunks `rank` is its host's delegate.
    pub fn represented(&self, rank: usize) -> impl Iterator<Item = usize> {
        let host = self.host[rank];
        (0..self.size()).filter(move |&owner| self.host[owner] != host && self.delegate(host, owner) == rank)
    }

    /// The ranks of other hosts to which `rank` needs a connection.
    pub fn peers(&self, rank: usize) -> Vec<usize> {
        let host = self.host[rank];
        let other = |peer: &usize| self.host[*peer] != host;
        let talks = |peer: &usize| self.delegate(host, *peer) == rank || self.delegate(self.host[*peer], rank) == *peer;
        (0..self.size()).filter(other).filter(talks).collect()
    }

    /// The largest subtrees of the pairwise tree over all ranks that lie on `host`, in order.
    pub fn subtrees(&self, host: usize) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        self.find_subtrees(host, 0..self.size(), &mut found);
        found
    }

    fn find_subtrees(&self, host: usize, ranks: Range<usize>, found: &mut Vec<Range<usize>>) {
        let here = ranks.clone().filter(|&rank| self.host[rank] == host).count();
        if here == ranks.len() {
            found.push(ranks);
        } else if here > 0 {
            let middle = ranks.start + split(ranks.len());
            self.find_subtrees(host, ranks.start..middle, found);
            self.find_subtrees(host, middle..ranks.end, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn equal_hosts_talk_rank_by_rank_and_send_one_sum() {
        let hosts = Hosts::new(&["a", "a", "b", "b", "c", "c", "d", "d"]);
        assert_eq!((hosts.count(), hosts.peers(3)), (4, vec![1, 5, 7]));
        assert!(hosts.subtrees(2).into_iter().eq(std::iter::once(4..6)));
        assert_eq!(hosts.represented(3).collect::<Vec<_>>(), [1, 5, 7]);
    }

    #[test]
    fn where_a_host_is_no_subtree_it_sends_several() {
        assert_eq!(Hosts::new(&[0, 0, 1, 1, 2, 2]).subtrees(1), [2..3, 3..4]);
        assert_eq!(Hosts::new(&[0, 1, 0, 1]).subtrees(0), [0..1, 2..3]);
        assert_eq!(Hosts::new(&[0, 0, 0, 0, 1]).subtrees(0), [0..3, 3..4]);
    }

    proptest! {
        #[test]
        fn every_chunk_has_one_delegate_a_host_and_both_know_of_the_connection(
            keys in prop::collection::vec(0usize..4, 1..12),
        ) {
            let hosts = Hosts::new(&keys);
            for owner in 0..keys.len() {
                for host in (0..hosts.count()).filter(|&host| host != hosts.of(owner)) {
                    let speaks = |rank: &&usize| hosts.represented(**rank).any(|for_whom| for_whom == owner);
                    prop_assert_eq!(hosts.members(host).iter().filter(speaks).count(), 1);
                }
                for peer in hosts.peers(owner) {
                    prop_assert!(hosts.peers(peer).contains(&owner));
                }
            }
            for host in 0..hosts.count() {
                let ranks: Vec<usize> = hosts.subtrees(host).into_iter().flatten().collect();
                prop_assert_eq!(&ranks[..], hosts.members(host));
            }
        }
    }
}
