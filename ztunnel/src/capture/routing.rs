//! Policy routing in the pod: what carries the return mark is delivered locally, whoever it is
//! addressed to.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

use super::Families;
use crate::contract::{MARK_MASK, RETURN_MARK, RETURN_RULE_PRIORITY, RETURN_TABLE};
use crate::netlink::{CHANGE, DUMP, Netlink};

/// The loopback device has this index in every network namespace.
const LOOPBACK: u32 = 1;

/// Sets rule and route in the families that exist; what stands already is left alone.
pub(super) fn ensure(families: Families) -> io::Result<()> {
    let netlink = Netlink::open(SockProtocol::NetlinkRoute)?;
    for family in present(families) {
        if !rule_stands(&netlink, family)? {
            netlink.route(
                RouteNetlinkMessage::NewRule(rule(family)),
                CHANGE | NLM_F_CREATE | NLM_F_EXCL,
                |_| {},
            )?;
        }
        netlink.route(
            RouteNetlinkMessage::NewRoute(route(family)),
            CHANGE | NLM_F_CREATE | NLM_F_REPLACE,
            |_| {},
        )?;
    }
    Ok(())
}

/// Whether rule and route stand in the families that exist.
pub(super) fn stands(families: Families) -> io::Result<bool> {
    let netlink = Netlink::open(SockProtocol::NetlinkRoute)?;
    for family in present(families) {
        if !rule_stands(&netlink, family)? || !route_stands(&netlink, family)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes rule and route from both families; nothing there is no error.
pub(super) fn remove() -> io::Result<()> {
    let netlink = Netlink::open(SockProtocol::NetlinkRoute)?;
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        absent_is_fine(netlink.route(RouteNetlinkMessage::DelRule(rule(family)), CHANGE, |_| {}))?;
        absent_is_fine(netlink.route(
            RouteNetlinkMessage::DelRoute(route(family)),
            CHANGE,
            |_| {},
        ))?;
    }
    Ok(())
}

fn present(families: Families) -> impl Iterator<Item = AddressFamily> {
    [AddressFamily::Inet]
        .into_iter()
        .chain(families.v6.then_some(AddressFamily::Inet6))
}

/// What the kernel says of a rule, a route or a family that is not there.
fn absent_is_fine(outcome: io::Result<()>) -> io::Result<()> {
    const ABSENT: [Errno; 4] = [
        Errno::ENOENT,
        Errno::ESRCH,
        Errno::EAFNOSUPPORT,
        Errno::EOPNOTSUPP,
    ];
    match outcome {
        Err(error)
            if ABSENT
                .iter()
                .any(|errno| error.raw_os_error() == Some(*errno as i32)) =>
        {
            Ok(())
        }
        outcome => outcome,
    }
}

fn rule_stands(netlink: &Netlink, family: AddressFamily) -> io::Result<bool> {
    let mut question = RuleMessage::default();
    question.header.family = family;
    let (wanted, mut found) = (rule(family), false);
    netlink.route(RouteNetlinkMessage::GetRule(question), DUMP, |answer| {
        if let RouteNetlinkMessage::NewRule(rule) = answer {
            found |= wanted
                .attributes
                .iter()
                .all(|attribute| rule.attributes.contains(attribute))
                && rule.header.action == RuleAction::ToTable;
        }
    })?;
    Ok(found)
}

fn route_stands(netlink: &Netlink, family: AddressFamily) -> io::Result<bool> {
    let mut question = RouteMessage::default();
    question.header.address_family = family;
    let mut found = false;
    netlink.route(RouteNetlinkMessage::GetRoute(question), DUMP, |answer| {
        if let RouteNetlinkMessage::NewRoute(route) = answer {
            found |= route.header.table == RETURN_TABLE
                && route.header.kind == RouteType::Local
                && route.header.destination_prefix_length == 0
                && route.attributes.contains(&RouteAttribute::Oif(LOOPBACK));
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
    message.attributes = vec![RouteAttribute::Oif(LOOPBACK)];
    message
}
