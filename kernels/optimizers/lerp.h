// Included in the namespace of each instruction set (kernels/optimizer_unit-inl.h).

// torch.lerp: from + (to - from) * weight, in the form whose error vanishes if the result is near
// `from` or near `to`; weight 1 gives exactly `to`. `rest` is 1 - weight; both are rounded from
// fp64.
template <class A>
struct Lerp {
  using F = typename A::F;
  ORLOP_RULE Lerp(float rest, float weight)
      : from_first(weight < 0.5f), factor(A::Set(from_first ? weight : -rest)) {}
  ORLOP_RULE F operator()(F from, F to) const {
    return A::MulAdd(factor, A::Sub(to, from), from_first ? from : to);
  }
  bool from_first;
  F factor;
};
