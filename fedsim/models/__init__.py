"""Models as pure functions of parameter values.

A client's parameters are a flat dict of tensors (`Params`), its optimiser state another; a model is a set of
functions of them. So a strategy can hold two views of one model (MMFeD3's private model and global copy), and a
runtime can stack the values of many clients.

Legend of shapes, the same words everywhere:

=================  =================================================================
batch              triples or queries of one step
num_entities       entities of the client (local ids), or of the server (global ids)
num_tokens         M: structure first, then the modalities in the data set's order
num_modalities     M - 1
num_kinds          embeddings of an entity: 1, or several with fusions that add up scores (one per token with `split`)
num_parts          query vectors of a query, see `fedsim.models.fusion.QueryPlan`: 1 with one kind
num_tables         relation tables: 1, or one per kind
num_candidates     entities scored per query
num_available      entities of which a modality is really there
dim                d, width of a token and of an entity embedding
relation_dim       width of a relation embedding of the scorer
=================  =================================================================
"""
