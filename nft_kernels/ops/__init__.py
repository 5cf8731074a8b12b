"""One file per op: public function, validation, autograd and compile registration."""
