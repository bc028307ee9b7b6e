//! Policy routing in a pod's namespace: packets with the return mark are delivered locally,
//! whatever their destination address is.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

use super::sysctl::Families;
use crate::netlink::{ACK, DUMP, Netlink};
use crate::ports_and_marks::{MARK_MASK, RETURN_MARK, RETURN_RULE_PRIORITY, RETURN_TABLE};

/// Interface index of the loopback device, the same in every network namespace.
const LOOPBACK_INDEX: u32 = 1;

/// Adds the rule and the route in the families that exist, where they are missing.
pub(super) fn ensure(families: Families) -> io::Result<()> {
    let netlink = Netlink::open(SockProtocol::NetlinkRoute)?;
    for family in existing(families) {
        if !has_rule(&netlink, family)? {
            netlink.route_request(
                RouteNetlinkMessage::NewRule(rule(family)),
                ACK | NLM_F_CREATE | NLM_F_EXCL,
                |_| {},
            )?;
        }
        netlink.route_request(
            RouteNetlinkMessage::NewRoute(route(family)),
            ACK | NLM_F_CREATE | NLM_F_REPLACE,
            |_| {},
        )?;
    }
    Ok(())
}

/// Whether the rule and the route are present in the families that exist.
pub(super) fn is_present(families: Families) -> io::Result<bool> {
    let netlink = Netlink::open(SockProtocol::NetlinkRoute)?;
    for family in existing(families) {
        if !has_rule(&netlink, family)? || !has_route(&netlink, family)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes the rule and the route from both families. It is no error if they are missing.
pub(super) fn remove() -> io::Result<()> {
    let netlink = Netlink::open(SockProtocol::NetlinkRoute)?;
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        ignore_missing(netlink.route_request(
            RouteNetlinkMessage::DelRule(rule(family)),
            ACK,
            |_| {},
        ))?;
        ignore_missing(netlink.route_request(
            RouteNetlinkMessage::DelRoute(route(family)),
            ACK,
            |_| {},
        ))?;
    }
    Ok(())
}

fn existing(families: Families) -> impl Iterator<Item = AddressFamily> {
    [AddressFamily::Inet]
        .into_iter()
        .chain(families.v6.then_some(AddressFamily::Inet6))
}

/// Turns the kernel's errors for a missing rule, route or address family into success.
fn ignore_missing(outcome: io::Result<()>) -> io::Result<()> {
    const MISSING: [Errno; 4] = [
        Errno::ENOENT,
        Errno::ESRCH,
        Errno::EAFNOSUPPORT,
        Errno::EOPNOTSUPP,
    ];
    match outcome {
        Err(error)
            if MISSING
                .iter()
                .any(|errno| error.raw_os_error() == Some(*errno as i32)) =>
        {
            Ok(())
        }
        outcome => outcome,
    }
}

fn has_rule(netlink: &Netlink, family: AddressFamily) -> io::Result<bool> {
    let mut request = RuleMessage::default();
    request.header.family = family;
    let (expected, mut found) = (rule(family), false);
    netlink.route_request(RouteNetlinkMessage::GetRule(request), DUMP, |reply| {
        if let RouteNetlinkMessage::NewRule(rule) = reply {
            found |= expected
                .attributes
                .iter()
                .all(|attribute| rule.attributes.contains(attribute))
                && rule.header.action == RuleAction::ToTable;
        }
    })?;
    Ok(found)
}

fn has_route(netlink: &Netlink, family: AddressFamily) -> io::Result<bool> {
    let mut request = RouteMessage::default();
    request.header.address_family = family;
    let mut found = false;
    netlink.route_request(RouteNetlinkMessage::GetRoute(request), DUMP, |reply| {
        if let RouteNetlinkMessage::NewRoute(route) = reply {
            found |= route.header.table == RETURN_TABLE
                && route.header.kind == RouteType::Local
                && route.header.destination_prefix_length == 0
                && route
                    .attributes
                    .contains(&RouteAttribute::Oif(LOOPBACK_INDEX));
        }
    })?;
    Ok(found)
}

/// `ip rule add fwmark 0x111/0xfff lookup 100`.
fn rule(family: AddressFamily) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family;
    message.header.table = RETURN_TABLE;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(RETURN_RULE_PRIORITY),
        RuleAttribute::FwMark(RETURN_MARK),
        RuleAttribute::FwMask(MARK_MASK),
        RuleAttribute::Table(u32::from(RETURN_TABLE)),
    ];
    message
}

/// `ip route add local default dev lo table 100`.
fn route(family: AddressFamily) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family,
        table: RETURN_TABLE,
        protocol: RouteProtocol::Static,
        scope: RouteScope::Host,
        kind: RouteType::Local,
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Oif(LOOPBACK_INDEX)];
    message
}
