//! Client and server of the service, with the bounds on messages set.

use tonic::transport::Channel;

use crate::{
    limits::MESSAGE_BYTES_MAX,
    v1::{self, fleet_client::FleetClient, fleet_server::FleetServer},
};

/// What agents call a gateway with.
pub fn fleet_client(channel: Channel) -> FleetClient<Channel> {
    FleetClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

/// What gateways serve.
pub fn fleet_server<S: v1::fleet_server::Fleet>(service: S) -> FleetServer<S> {
    FleetServer::new(service)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

impl From<v1::from_agent::Body> for v1::FromAgent {
    fn from(body: v1::from_agent::Body) -> Self {
        Self { body: Some(body) }
    }
}

impl From<v1::from_gateway::Body> for v1::FromGateway {
    fn from(body: v1::from_gateway::Body) -> Self {
        Self { body: Some(body) }
    }
}
