"""Secure aggregation: the server learns the sum of the clients' updates and no single one (docs/security.md).

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, against a
server that is honest but curious. A round has four phases:

0. advertise keys: each client u sends two public keys, c_u for encryption and s_u for masks; the server passes all on;
1. share keys: each client splits the secret of s_u and the seed b_u of its self-mask among all clients, so that t of
   them can join either, and sends each its shares, encrypted, through the server;
2. masked input: each client sends y_u = x_u + PRG(b_u) + sum over v > u of PRG(s_uv) - sum over v < u of PRG(s_uv),
   modulo 2^64, with s_uv the secret that the keys of u and v agree on;
3. unmasking: the server says who sent y. The others then send it their shares of b_u for those who did and of the
   secret of s_u for those who did not, and it subtracts the masks that are left in the sum.

Vectors x_u are in the project's fixed point (`fedsim.federated.aggregation`), so the sum is the plain one to the bit.
What is ours: rows are masked between those alone who both have them, unless ownership is hidden (docs/security.md), and
s_u follows from a seed of 128 bits, because that is what the library shares.

Symbols: b_u `self_seed`, secret of s_u `mask_seed`, s_uv `keys.agree`, t `threshold`, x_u `PlainInput`, y_u
`MaskedUpdate`, U_1 `Roster.keys`, U_2 `ShareDelivery.ciphertexts`, U_3 `UnmaskRequest.survivors`.
"""
