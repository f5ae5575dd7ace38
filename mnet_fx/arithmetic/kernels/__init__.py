"""The same loops over elements three times: in torch, in C, by inductor; and the choice between them."""
